"""The comparison on long-tailed digits, made tiny: what is written, said and refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import long_tail
from experiments.claims import training
from experiments.claims.long_tail import measure


@pytest.fixture
def tiny():
    return long_tail.digits()._replace(seeds=1, steps=2)


def test_digits_alone_give_a_picture_and_a_page(monkeypatch, tiny, tmp_path, capsys):
    """With methods that learn nothing, as compiling those that do takes half a minute."""
    names, untrained = list(long_tail.methods(tiny))[:3], lambda key, task: measure(task.x_test[:, :10], task.y_test)
    monkeypatch.setattr(long_tail, "digits", lambda: tiny)
    monkeypatch.setattr(long_tail, "methods", lambda bed: dict.fromkeys(names, ("as it is", untrained)))
    folder, nowhere = tmp_path / "made" / "docs", tmp_path / "nowhere"
    long_tail.main(["long_tail", f"--data_dir={nowhere}", f"--folder={folder}"])
    said, page = capsys.readouterr(), (folder / "long-tail.md").read_text()
    assert f"no mnist_10k in --data_dir={nowhere}: digits alone" in said.err
    assert said.out.strip() in page
    assert "120, 82, 56, 39, 26, 18, 12, 9, 6, 4 training images" in page
    assert all(f"| {name} | as it is |" in page for name in names)
    assert (folder / "long-tail.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_gives_the_accuracies_of_all_classes(tiny):
    task = training.Task(np.zeros((372, 64)), np.zeros(372, int), np.zeros((400, 64)), np.zeros(400, int))
    for _, run in long_tail.methods(tiny).values():
        found = jax.eval_shape(run, jax.random.key(0), jax.tree.map(jnp.asarray, task))
        assert {name: value.shape for name, value in found.items()} == {
            "classes": (10,), "balanced": (), "head": (), "tail": ()
        }  # fmt: skip


def test_a_wrong_flag_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        long_tail.main(["long_tail", "--foldr=docs", "--steps=3"])
    assert "unrecognized arguments: --foldr=docs" in capsys.readouterr().err
