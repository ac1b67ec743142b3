"""One selector by path: the first match decides, and a rule that says nothing is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import optim, tree
from steelyard.train import sharding

PARAMS = {
    "stem": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.ones(3), "none": None},
    "head": {"kernel": jnp.full((3, 2), 4.0), "bias": jnp.ones(2)},
}
GRADS = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)


def run(tx, grads=GRADS, params=PARAMS, **extra_args):
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p, **extra_args))(grads, params)


def test_each_kind_of_rule():
    tx = optim.by_path(
        {
            r"stem/bias": None,
            r".*/bias": 3.0,
            r"head/.*": optax.add_decayed_weights(0.1),
            r".*": lambda count: 10.0 + count,
        }
    )
    updates, state = run(tx)
    expected = {
        "stem": {"kernel": np.full((2, 3), 5.0), "bias": np.zeros(3), "none": None},
        "head": {"kernel": np.full((3, 2), np.float32(0.5) + np.float32(0.1) * 4), "bias": np.full(2, 1.5)},
    }
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    updates, _ = jax.jit(tx.update)(GRADS, state, PARAMS)
    np.testing.assert_array_equal(updates["stem"]["kernel"], 5.5)  # the schedule has counted one update


@pytest.mark.parametrize(
    ("default", "expected"), [(None, 0.5), (2.0, 1.0), (optax.scale(-1.0), -0.5), (lambda count: 4.0, 2.0)]
)
def test_leaves_that_no_rule_matches(default, expected):
    updates, _ = run(optim.by_path({"head/.*": None}, default=default))
    np.testing.assert_array_equal(updates["stem"]["kernel"], np.float32(expected))
    np.testing.assert_array_equal(updates["head"]["kernel"], 0)


def test_a_rule_sees_its_own_leaves_alone():
    """Each half is clipped by its own norm: sqrt(9) * 0.5 and sqrt(8) * 0.5."""
    updates, _ = run(optim.by_path({r"stem/.*": optax.clip_by_global_norm(0.1), r".*": optax.clip_by_global_norm(0.2)}))
    np.testing.assert_allclose(updates["stem"]["kernel"], 0.1 / 3, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["bias"], 0.2 / np.sqrt(8), rtol=1e-6)


def test_moments_exist_only_where_their_rule_is():
    tx = optim.by_path({r".*/bias": None, r"head/.*": optax.adam(0.1), r".*": 0.1})
    assert [path for path, x in tree.flatten(tx.init(PARAMS)) if jnp.ndim(x)] == [
        f"inner_states/rule_1/inner_state/0/{moment}/head/kernel" for moment in ("mu", "nu")
    ]


def test_the_update_of_a_group_is_that_of_its_rule_alone():
    inner = optim.adamp(0.1, weight_decay=0.1)
    updates, _ = run(optim.by_path({r".*/kernel": inner, r".*/bias": optax.sgd(0.1)}))
    kernels, biases = tree.partition(PARAMS, r".*/kernel")
    alone = tree.combine(
        run(inner, tree.partition(GRADS, r".*/kernel")[0], kernels)[0],
        run(optax.sgd(0.1), tree.partition(GRADS, r".*/kernel")[1], biases)[0],
    )
    jax.tree.map(np.testing.assert_array_equal, updates, alone)


def test_extra_arguments_reach_the_rules():
    """`normalize_by_error` divides by its extra argument."""
    tx = optax.chain(optim.by_path({"head/.*": optim.normalize_by_error(), ".*": 1.0}), optax.scale(1.0))
    updates, _ = run(tx, error=jnp.float32(0.25))
    np.testing.assert_array_equal(updates["head"]["bias"], 2.0)
    np.testing.assert_array_equal(updates["stem"]["bias"], 0.5)


def test_masks_reach_a_sparse_rule():
    masks = {"stem": {"kernel": jnp.eye(2, 3, dtype=bool), "bias": None, "none": None}, "head": None}
    masks["head"] = {"kernel": jnp.eye(3, 2, dtype=bool), "bias": None}
    tx = optim.by_path({"head/.*": optim.sparse(optax.adam(0.1)), ".*": 1.0})
    updates, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS, masks=masks)
    np.testing.assert_array_equal(updates["head"]["kernel"] != 0, masks["head"]["kernel"])
    np.testing.assert_array_equal(updates["stem"]["kernel"], 0.5)
    mu = optax.tree.get(state, "mu")
    np.testing.assert_array_equal(mu["head"]["kernel"] != 0, masks["head"]["kernel"])


@pytest.mark.parametrize("factor", [0.3, np.float32(0.3), jnp.float32(0.3), 3], ids=str)
def test_the_factor_does_not_change_the_dtype(factor):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    updates, _ = run(optim.by_path({".*": factor}), params, params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(updates["stem"]["bias"], jnp.bfloat16(factor))


names = st.sampled_from(["a", "b", "c"])


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(names, st.dictionaries(names, st.just(1.0), min_size=1), min_size=1), st.permutations("abc"))
def test_the_first_match_decides(params, order):
    """Three patterns that overlap, against a loop over them."""
    patterns = [rf"{letter}/.*|.*/{letter}" for letter in order]
    first = {path: next(i for i, key in enumerate(patterns) if re.fullmatch(key, path)) for path in tree.paths(params)}
    tx = optim.by_path({patterns[i]: float(i + 1) for i in sorted(set(first.values()))})
    params = jax.tree.map(np.float32, params)
    updates, _ = tx.update(params, tx.init(params))
    assert dict(tree.flatten(updates)) == {path: i + 1 for path, i in first.items()}


@pytest.mark.parametrize("params", [{}, None, {"a": None}])
def test_a_tree_without_leaves(params):
    tx = optim.by_path({".*": optax.adam(0.1)})
    assert tx.update(params, tx.init(params), params)[0] == params


def test_a_bare_scalar():
    np.testing.assert_array_equal(run(optim.by_path({"": 2.0}), jnp.float32(3), jnp.float32(1))[0], 6)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"(": 1.0}, r"'\(' is not a regular expression"),
        ({1: 1.0}, "1 is not a regular expression"),
        ({".*": "fast"}, r"rules\['\.\*'\]='fast' must be an optax transformation, a number, a schedule or None"),
        ({".*": True}, "True must be"),
        ({".*": np.ones(2)}, r"shape \(2,\); a multiplier is one number"),
    ],
)
def test_bad_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        optim.by_path(rules)


def test_a_bad_default():
    with pytest.raises(ValueError, match="default='x' must be"):
        optim.by_path({}, default="x")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"head/kernels": None}, r"'head/kernels' matches none of the 4 parameters .*head/kernel"),
        ({"head/.*": None, "head/bias": 1.0}, r"'head/bias' never applies: its leaves .*head/bias.*'head/"),
        (
            {".*bias": None, "head/.*": 1.0, ".*d/.*": 2.0},
            r"never applies: .*head/kernel.*'\.\*bias', 'head",
        ),
    ],
)
def test_patterns_that_say_nothing(rules, message):
    with pytest.raises(ValueError, match=message):
        optim.by_path(rules).init(PARAMS)


def test_the_state_is_placed_like_the_parameters():
    tx = optim.by_path({r".*/bias": None, r".*": optax.adam(0.1)})
    params = {"dense": {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}, "kernel": jnp.ones((8, 16))}
    mesh = sharding.make_mesh({"fsdp": 8})
    state = {"params": params, "opt_state": tx.init(params)}
    placed = sharding.state_shardings(state, [(".*kernel", ("fsdp", None)), ("kernel", (None, "fsdp"))], mesh, tx)
    flat = dict(tree.flatten(placed["opt_state"]))
    for path in ("dense/kernel", "kernel"):
        leaf = placed["params"]["dense"]["kernel"] if "/" in path else placed["params"]["kernel"]
        assert flat[f"inner_states/rule_1/inner_state/0/mu/{path}"] == leaf
