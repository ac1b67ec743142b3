"""Names of backends, and the small types of the kernels."""

import pytest

from steelyard_kernels import common


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_available_backends_pass(backend):
    assert common.check_backend(backend, ("auto", "reference")) is None


def test_misspelt_backend_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'reference'"):
        common.check_backend("referense", common.BACKENDS)


def test_unrelated_backend_lists_all():
    with pytest.raises(ValueError, match=", ".join(common.BACKENDS)):
        common.check_backend("zzz", common.BACKENDS)


@pytest.mark.parametrize("backend", ["tpu", "gpu", "cpu", "interpret"])
def test_backend_that_is_not_built_is_refused(backend):
    with pytest.raises(ValueError, match=f"'{backend}' is not built.*built: auto, reference"):
        common.check_backend(backend, ("auto", "reference"))


def test_types():
    assert common.Tile(1, 2, 3)._asdict() == {"bm": 1, "bn": 2, "bk": 3}
    assert common.Partition(None, n="model")[1:] == (None, None, "model")
