"""One flag for all that measure by room."""

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import rooms


def chosen(value):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["rooms"])
    with flagsaver.flagsaver(room=value):
        return rooms.chosen(("optim", "train"))


def test_one_or_all():
    assert chosen("all") == ("optim", "train")
    assert chosen("train") == ("train",)


def test_a_wrong_room_names_the_right_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        chosen("optimm")
    assert "--room='optimm' is not one of all, optim, train; did you mean 'optim'?" in capsys.readouterr().err
