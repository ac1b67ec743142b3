"""One name, one dataset; and importing the room imports no framework."""

import os
import subprocess
import sys

import numpy as np
import pytest

from steelyard import data
from steelyard.data import embedded


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine", "diabetes"])
def test_load_is_the_datasets_own_function(name):
    got, expected = data.load(name, split="test"), getattr(embedded, name)(split="test")
    assert (got.name, got.info) == (name, expected.info)
    for column in expected.columns:
        np.testing.assert_array_equal(got.columns[column], expected.columns[column])


def test_options_are_passed_on():
    assert data.load("python_source", split="test", length=31).columns["tokens"].shape[1] == 32
    assert data.load("wine", standardize=False).columns["features"].max() > 1000  # proline, in mg/l


@pytest.mark.parametrize(
    ("name", "near"), [("digit", "digits"), ("brest_cancer", "breast_cancer"), ("python", "python_source")]
)
def test_an_unknown_name_lists_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"unknown dataset '{name}'; nearest: {near}.*tfds:<name>"):
        data.load(name)


def test_an_unknown_name_unlike_any_other():
    with pytest.raises(ValueError, match="unknown dataset 'qqqq'; embedded: breast_cancer, diabetes"):
        data.load("qqqq")


def test_an_unknown_option_lists_those_that_exist():
    with pytest.raises(ValueError, match="digits has no option 'length'; its options: label_noise"):
        data.load("digits", length=3)
    with pytest.raises(ValueError, match="python_source has no option 'size'; its options: length"):
        data.load("python_source", size=3)
    with pytest.raises(ValueError, match="tfds:x has no option 'size'; its options: in_memory, length, text"):
        data.load("tfds:x", size=3)


def test_importing_the_room_imports_no_framework():
    program = (
        "import sys, steelyard.data\n"
        "print(sorted({'sklearn', 'grain', 'tensorflow_datasets', 'flax'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
