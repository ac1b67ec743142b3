"""Names in a config become functions, and everything misspelt is named."""

import re

import optax
import pytest
from ml_collections import ConfigDict

from experiments import components
from steelyard import optim, reparam

ADAMP = {"name": "adamp", "learning_rate": 1e-3}


def test_a_component_is_the_function_with_its_arguments():
    assert isinstance(components.make(ADAMP, [optim, optax], "config.optimizer"), optax.GradientTransformation)
    assert components.make(ConfigDict({"name": "nearest", "words": 1}), [MODULE], "c", "ab") == ("ab", 1)


class MODULE:
    """Stands for a module of components."""

    __all__ = ("nearest", "schedule")
    __name__ = "MODULE"

    @staticmethod
    def nearest(word, words=2):
        if word == "":
            raise ValueError("word='' must not be empty")
        return word, words

    @staticmethod
    def schedule(value):
        return lambda step: value


def test_components_nest_and_come_in_order():
    spec = ConfigDict({"name": "nearest", "word": {"name": "schedule", "value": 3}})
    word, _ = components.make(spec, [MODULE], "c")
    assert word(0) == 3
    both = components.make_all([{"name": "nearest", "word": "a"}, {"name": "nearest", "word": "b"}], [MODULE], "c")
    assert both == [("a", 2), ("b", 2)]
    assert components.make_all((), [MODULE], "c") == components.make_all(None, [MODULE], "c") == []


def test_an_argument_of_the_caller_gives_way_to_the_config():
    spec = {"name": "nearest", "word": "a"}
    assert components.make(spec, [MODULE], "c", optional={"words": 5, "other": 6}) == ("a", 5)
    assert components.make(spec | {"words": 7}, [MODULE], "c", optional={"words": 5}) == ("a", 7)


@pytest.mark.parametrize(
    ("spec", "modules", "message"),
    [
        (ADAMP | {"name": "adampp"}, [optim, optax], r"config.x.name='adampp' is not a public .*nearest: adamp"),
        (ADAMP | {"weight_dekay": 1}, [optim], r"config.x.weight_dekay is not a key .*; nearest: weight_decay"),
        ({"learning_rate": 1}, [optim], "no key 'name'"),
        ({"name": "adamp"}, [optim], re.escape("config.x (adamp) needs the key learning_rate")),
        ({"name": "nm_sparse", "n": 5, "m": 4}, [reparam], r"config.x: .*n=5"),
        ({"name": "nearest", "word": ""}, [MODULE], "config.x: word='' must not be empty"),
    ],
)
def test_what_cannot_be_made_is_named(spec, modules, message):
    with pytest.raises(components.ConfigError, match=message):
        components.make(spec, modules, "config.x")


def test_a_list_names_the_place():
    with pytest.raises(components.ConfigError, match=re.escape("config.x[1].nn is not a key")):
        components.make_all([{"name": "nearest", "word": "a"}, {"name": "nearest", "nn": 1}], [MODULE], "config.x")


def test_plain_configs_are_json():
    config = ConfigDict({"a": (ConfigDict({"b": 1}), 2), "c": {"d": None}})
    assert components.plain(config) == {"a": [{"b": 1}, 2], "c": {"d": None}}
