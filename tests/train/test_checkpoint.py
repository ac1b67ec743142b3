"""Saving and restoring: bit for bit, on other meshes, and when something is broken."""

import os
import resource
import runpy
import shutil
import signal
import sys
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import tree
from steelyard.train import checkpoint, rules, sharding

# Orbax closes its event loop under the reads that are still running when one fails; what they raise then is no news.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    model_state: Any
    example_state: Any
    rng: Any


TX = optax.adamw(1e-2)


def make_state(seed=0, step=0):
    rng = np.random.default_rng(seed)
    params = {
        "dense": {"kernel": jnp.asarray(rng.normal(size=(128, 64)), jnp.float32), "bias": None},
        "half": jnp.asarray(rng.normal(size=24), jnp.bfloat16),
    }
    # A NaN with a payload and a negative zero: equal bits, not equal numbers.
    odd = np.array([0x7FC01234, 0x80000000], np.uint32).view(np.float32)
    return State(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state=TX.init(params),
        model_state={"counts": jnp.arange(5, dtype=jnp.int8), "odd": jnp.asarray(odd)},
        example_state={"seen": jnp.arange(16) % 3 == 0, "none": jnp.zeros((0, 4))},
        rng=jax.random.key(7 + seed),
    )


def targets(devices=8, sizes=None):
    """Shapes with shardings on a mesh of so many devices."""
    mesh = sharding.make_mesh(sizes or {"fsdp": -1}, devices=jax.devices()[:devices])
    shapes = jax.eval_shape(make_state)
    return sharding.with_shardings(shapes, sharding.state_shardings(shapes, rules.FSDP, mesh, TX, min_size=1))


def place(state, like):
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, like))


def bits(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x).tobytes()


def assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), (_, b) in zip(tree.flatten(got), tree.flatten(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert bits(a) == bits(b), path


@pytest.fixture(scope="module")
def on_eight():
    return targets()


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory, on_eight):
    """A directory with steps 1, 2 and 3; step n holds `make_state(n, n)`."""
    directory = tmp_path_factory.mktemp("run") / "three"
    with checkpoint.Checkpoints(directory, every=1) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, place(make_state(step, step), on_eight), meta={"config": {"lr": 0.1}})
    return directory


@pytest.fixture
def copy(three_steps, tmp_path):
    return shutil.copytree(three_steps, tmp_path / "copy")


@pytest.mark.parametrize(
    ("devices", "sizes"), [(8, None), (8, {"data": 2, "fsdp": 4}), (4, None), (1, None)], ids=["8", "2x4", "4", "1"]
)
def test_round_trip_bit_for_bit_on_any_mesh(three_steps, devices, sizes):
    like = targets(devices, sizes)
    with checkpoint.Checkpoints(three_steps, read_only=True) as checkpoints:
        state, meta = checkpoints.restore(like)
    assert_same_bits(state, make_state(3, 3))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, like)
    assert meta["step"] == 3
    assert meta["config"] == {"lr": 0.1}
    assert meta["mesh"]["fsdp"] == 8  # of the mesh that saved it
    assert meta["versions"]["jax"] == jax.__version__
    assert "arrays" not in meta


def test_a_restored_state_can_be_donated_and_keeps_its_shardings(three_steps, on_eight):
    with checkpoint.Checkpoints(three_steps, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(on_eight, step=2)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    kernel = step(step(state.params["dense"]["kernel"]))
    np.testing.assert_array_equal(kernel, make_state(2).params["dense"]["kernel"] + 1 + 1)
    assert kernel.sharding == on_eight.params["dense"]["kernel"].sharding


def test_steps_to_restore(three_steps, on_eight, tmp_path):
    with checkpoint.Checkpoints(three_steps, read_only=True) as checkpoints:
        assert checkpoints.latest() == 3
        state, meta = checkpoints.restore(on_eight, step=1)
        assert (int(state.step), meta["step"]) == (1, 1)
        with pytest.raises(FileNotFoundError, match=r"checkpoint of step 5 .*\[1, 2, 3\]"):
            checkpoints.restore(on_eight, step=5)
    with checkpoint.Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            checkpoints.restore(on_eight)


# Damage.


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(bytes(content))


def largest_data(step):
    """The file with the kernel, whose random bits do not compress: by far the largest."""
    return max((p for p in (step / "state").rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE = {
    "data deleted": lambda step: largest_data(step).unlink(),
    "data truncated": lambda step: halve(largest_data(step)),
    "data zeroed": lambda step: zero(largest_data(step)),
    "a bit flipped": lambda step: flip(largest_data(step)),
    "manifest truncated": lambda step: halve(step / "state" / "manifest.ocdbt"),
    "structure truncated": lambda step: halve(step / "state" / "_METADATA"),
    "state deleted": lambda step: shutil.rmtree(step / "state"),
    "meta deleted": lambda step: shutil.rmtree(step / "meta"),
    "meta truncated": lambda step: halve(step / "meta" / "metadata"),
    "all but the folder deleted": lambda step: [shutil.rmtree(step), step.mkdir()],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_newest_step_is_passed_over_and_left_alone(copy, name, on_eight):
    DAMAGE[name](copy / "3")
    files = sorted(p.relative_to(copy) for p in copy.rglob("*"))
    with checkpoint.Checkpoints(copy, read_only=True) as checkpoints:
        with pytest.warns(UserWarning, match="restored step 2 instead of a newer one: checkpoint 3 in .* is damaged"):
            state, meta = checkpoints.restore(on_eight)
        assert_same_bits(state, make_state(2, 2))
        assert meta["step"] == 2
        with pytest.raises(checkpoint.DamagedCheckpointError, match="checkpoint 3"):
            checkpoints.restore(on_eight, step=3)
    assert sorted(p.relative_to(copy) for p in copy.rglob("*")) == files


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt"])
def test_what_a_state_does_not_need_may_be_gone(copy, name, on_eight):
    (copy / "3" / name).unlink(missing_ok=True)
    with checkpoint.Checkpoints(copy, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(on_eight)
    assert int(state.step) in (2, 3)
    assert_same_bits(state, make_state(int(state.step), int(state.step)))


def test_all_damaged(copy, on_eight):
    for step in "123":
        halve(copy / step / "meta" / "metadata")
    with (
        checkpoint.Checkpoints(copy, read_only=True) as checkpoints,
        pytest.raises(checkpoint.DamagedCheckpointError, match=r"checkpoint 3 .*checkpoint 2 .*checkpoint 1 "),
    ):
        checkpoints.restore(on_eight)


def test_an_unfinished_save_is_no_checkpoint_and_does_not_bar_its_step(copy, on_eight):
    shutil.move(copy / "3", copy / "3.orbax-checkpoint-tmp")
    with checkpoint.Checkpoints(copy, every=1) as checkpoints:
        assert checkpoints.latest() == 2
        state, _ = checkpoints.restore(on_eight)
        assert int(state.step) == 2
        assert checkpoints.save(3, place(make_state(9, 3), on_eight))
        assert_same_bits(checkpoints.restore(on_eight)[0], make_state(9, 3))


def test_a_damaged_step_is_set_aside_by_the_next_save_of_any_step(copy, on_eight):
    halve(largest_data(copy / "3"))
    with checkpoint.Checkpoints(copy, every=1, keep=2) as checkpoints:
        with pytest.warns(UserWarning, match="step 2 instead"):
            checkpoints.restore(on_eight)
        assert checkpoints.save(3, place(make_state(4, 3), on_eight))
        checkpoints.wait()
        assert sorted(os.listdir(copy)) == ["2", "3", "3.damaged-0"]
        assert_same_bits(checkpoints.restore(on_eight)[0], make_state(4, 3))


# Structure.


def test_another_structure_is_an_error_that_lists_paths(three_steps, on_eight):
    params = dict(on_eight.params)
    half = params.pop("half")
    params["extra"] = half
    params["dense"] = {"kernel": jax.ShapeDtypeStruct((128, 4), jnp.float32, sharding=half.sharding), "bias": None}
    with (
        checkpoint.Checkpoints(three_steps, read_only=True) as checkpoints,
        warnings.catch_warnings(action="error"),
        pytest.raises(ValueError, match=r"checkpoint 3 in .* does not fit this state") as error,
    ):
        checkpoints.restore(on_eight._replace(params=params))
    lines = str(error.value).splitlines()
    assert lines[1] == "  not in the checkpoint: params/extra"
    assert lines[2] == "  only in the checkpoint: params/half"
    assert lines[3] == "  of another type there: params/dense/kernel (float32[128,64], here float32[128,4])"


def test_another_dtype_or_kind_of_key_is_an_error(three_steps, on_eight):
    key = jax.ShapeDtypeStruct(
        (), jax.eval_shape(lambda: jax.random.key(0, impl="rbg")).dtype, sharding=on_eight.rng.sharding
    )
    wide = jax.ShapeDtypeStruct((), jnp.float32, sharding=on_eight.step.sharding)
    with checkpoint.Checkpoints(three_steps, read_only=True) as checkpoints:
        with pytest.raises(ValueError, match=r"rng \(key<fry>\[\], here key<rbg>\[\]\)"):
            checkpoints.restore(on_eight._replace(rng=key))
        with pytest.raises(ValueError, match=r"step \(int32\[\], here float32\[\]\)"):
            checkpoints.restore(on_eight._replace(step=wide))


def test_only_some_leaves(three_steps, on_eight):
    with checkpoint.Checkpoints(three_steps, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(on_eight, only=r"params/.*")
        assert_same_bits(state.params, make_state(3).params)
        assert [path for path, _ in tree.flatten(state)] == ["params/dense/kernel", "params/half"]
        fresh = tree.combine(state, make_state(8))
        assert_same_bits(fresh.params, make_state(3).params)
        assert_same_bits(fresh.rng, make_state(8).rng)
        with pytest.raises(ValueError, match="only='parms/"):
            checkpoints.restore(on_eight, only=r"parms/.*")
        fewer = on_eight._replace(params={"half": on_eight.params["half"]})
        with pytest.raises(ValueError, match="only in the checkpoint: params/dense/kernel"):
            checkpoints.restore(fewer, only=r"params/.*")


def test_shardings_are_required(three_steps):
    with (
        checkpoint.Checkpoints(three_steps, read_only=True) as checkpoints,
        pytest.raises(ValueError, match=r"sharding of every leaf.* have none: step"),
    ):
        checkpoints.restore(jax.eval_shape(make_state))


def test_a_sharding_that_does_not_divide_is_no_damage(three_steps, on_eight):
    mesh = sharding.make_mesh({"fsdp": 7}, devices=jax.devices()[:7])
    uneven = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    counts = jax.ShapeDtypeStruct((5,), jnp.int8, sharding=uneven)
    with (
        checkpoint.Checkpoints(three_steps, read_only=True) as checkpoints,
        pytest.raises(ValueError, match=r"divide|divisible"),
    ):
        checkpoints.restore(on_eight._replace(model_state=on_eight.model_state | {"counts": counts}))


# Saving.


def test_intervals_and_what_is_kept(tmp_path, on_eight):
    state = place(make_state(), on_eight)
    with checkpoint.Checkpoints(tmp_path, every=2, keep=2, keep_every=4) as checkpoints:
        saved = [step for step in range(1, 11) if checkpoints.save(step, state)]
        assert checkpoints.save(11, state, force=True)
    assert saved == [2, 4, 6, 8, 10]
    assert sorted(map(int, os.listdir(tmp_path))) == [4, 8, 10, 11]


def test_the_same_step_again_does_nothing(tmp_path, on_eight):
    with checkpoint.Checkpoints(tmp_path, every=1) as checkpoints, warnings.catch_warnings(action="error"):
        assert checkpoints.save(1, place(make_state(1), on_eight))
        assert not checkpoints.save(1, place(make_state(2), on_eight))
        assert not checkpoints.save(1, place(make_state(2), on_eight), force=True)
        assert_same_bits(checkpoints.restore(on_eight)[0], make_state(1))
    with checkpoint.Checkpoints(tmp_path, every=1) as checkpoints:
        with pytest.warns(UserWarning, match="already has a checkpoint of step 1, from an earlier run"):
            assert not checkpoints.save(1, place(make_state(2), on_eight))
        checkpoints.restore(on_eight)
        with warnings.catch_warnings(action="error"):
            assert not checkpoints.save(1, place(make_state(2), on_eight))


def test_saving_is_safe_from_donation(tmp_path):
    """The step after `save` overwrites the buffers of the state, over and over, while they are written."""
    like = {"params": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    mesh = sharding.make_mesh({"fsdp": 8})
    for number, spec in enumerate(("fsdp", None)):
        placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(spec))
        step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
        shapes = sharding.with_shardings(like, {"params": placed})
        state = {"params": jax.device_put(jnp.zeros((256, 256)), placed)}
        with checkpoint.Checkpoints(tmp_path / str(number), every=1, keep=9) as checkpoints:
            for count in range(6):
                state = jax.block_until_ready(step(state))
                checkpoints.save(count, state)
                for _ in range(4):
                    state = step(state)
            checkpoints.wait()
            for count in range(6):
                # Before save number `count` there were count + 1 single steps and 4 more after each earlier save.
                restored, _ = checkpoints.restore(shapes, step=count)
                np.testing.assert_array_equal(restored["params"], 5 * count + 1)


def test_nonfinite_parameters_are_refused_unless_forced(tmp_path, on_eight):
    state = make_state()
    bad = state._replace(params=state.params | {"half": state.params["half"].at[3].set(jnp.inf)})
    with checkpoint.Checkpoints(tmp_path, every=1) as checkpoints:
        with pytest.raises(ValueError, match=r"1 parameters are not finite: params/half.*force=True"):
            checkpoints.save(1, place(bad, on_eight))
        assert checkpoints.latest() is None
        assert checkpoints.save(1, place(bad, on_eight), force=True)
        assert_same_bits(checkpoints.restore(on_eight)[0], bad)


@pytest.mark.parametrize(
    ("meta", "text"), [({"config": object()}, "must be JSON"), ({"mesh": 1}, "reserved"), ({"arrays": 1}, "reserved")]
)
def test_meta_is_checked_before_anything_is_written(tmp_path, meta, text):
    with checkpoint.Checkpoints(tmp_path, every=1) as checkpoints:
        with pytest.raises(ValueError, match=text):
            checkpoints.save(1, {"params": jnp.ones(3)}, meta=meta)
        assert checkpoints.latest() is None


@pytest.fixture
def disk_full():
    """Files may not grow beyond 20 kB: what a full disk does, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(on):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if on else soft, hard))

    yield limit
    limit(False)


@pytest.mark.parametrize("how", ["wait", "save"])
def test_a_save_that_failed_in_the_background_is_reported_once(tmp_path, disk_full, how):
    noise = jnp.asarray(np.random.default_rng(0).normal(size=30_000), jnp.float32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), {"params": noise})
    with checkpoint.Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(1, {"params": noise})
        checkpoints.wait()
        disk_full(True)
        checkpoints.save(2, {"params": noise + 1})
        with pytest.raises(OSError, match=r"saving step 2 to .* failed"):
            checkpoints.wait() if how == "wait" else checkpoints.save(3, {"params": noise})
        disk_full(False)
        assert checkpoints.latest() == 1
        assert checkpoints.save(2, {"params": noise + 2})  # not mistaken for one that exists
        state, _ = checkpoints.restore(shapes)
        np.testing.assert_array_equal(state["params"], noise + 2)


# Directories and options.


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        checkpoint.Checkpoints(tmp_path / "file")
    with pytest.raises(OSError, match="cannot be created"):
        checkpoint.Checkpoints(tmp_path / "file" / "sub")


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not bind the superuser
    with pytest.raises(PermissionError, match="not writable; read_only=True"):
        checkpoint.Checkpoints(tmp_path)


def test_read_only(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint.Checkpoints(tmp_path / "new", read_only=True)
    with (
        checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(ValueError, match="read_only"),
    ):
        checkpoints.save(1, {"params": jnp.ones(3)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", [{"keep": 0}, {"every": 0}, {"keep_every": -1}])
def test_numbers_are_positive(tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* must be positive"):
        checkpoint.Checkpoints(tmp_path, **options)


# Preemption.


def test_preemption_notes_the_signal_and_restores_the_handler():
    before = signal.getsignal(signal.SIGTERM)
    with checkpoint.Preemption() as preemption:
        assert not preemption.requested
        signal.raise_signal(signal.SIGTERM)
        assert preemption.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_checkpoints_ask_for_preemption(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert signal.getsignal(signal.SIGTERM) is before  # nobody has asked
        assert not checkpoints.preempted()
        signal.raise_signal(signal.SIGTERM)
        assert checkpoints.preempted()
        assert checkpoints.preempted(step=3)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("module", [checkpoint, sharding])
def test_orbax_is_imported_only_at_use(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax", None)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    assert module.__doc__ == runpy.run_path(module.__file__)["__doc__"]
