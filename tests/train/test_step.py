"""Each way of composing a step, against a step written by hand on the same tiny model.

The model is a perceptron with one hidden layer and two heads, so that two tasks share parameters and disagree. Both
sides compute in float32 with the same operations in another order: they differ by rounding, 1e-5 relative at most.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate, losses, optim, reparam, sparsity, train

BATCH, INPUTS, HIDDEN, CLASSES = 8, 6, 16, 3
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "hidden": {"kernel": jax.random.normal(keys[0], (INPUTS, HIDDEN)) / 2, "bias": jnp.zeros(HIDDEN)},
        "class": {"kernel": jax.random.normal(keys[1], (HIDDEN, CLASSES)) / 4},
        "value": {"kernel": jax.random.normal(keys[2], (HIDDEN, 1)) / 4},
    }


def make_batch(seed=1):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "x": jax.random.normal(keys[0], (BATCH, INPUTS)),
        "label": jax.random.randint(keys[1], (BATCH,), 0, CLASSES),
        "target": jax.random.normal(keys[2], (BATCH,)),
        "index": jnp.arange(BATCH)[::-1],
    }


def forward(params, batch, *, rng=None, train=True):
    del rng, train
    hidden = jnp.tanh(batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return {"logits": hidden @ params["class"]["kernel"], "value": (hidden @ params["value"]["kernel"])[:, 0]}


def task_losses(outputs, batch):
    return {
        "class": losses.softmax_cross_entropy_with_integer_labels(outputs["logits"], batch["label"]),
        "value": losses.squared_error(outputs["value"], batch["target"]),
    }


def mean_losses(params, batch, fwd=forward):
    return jnp.stack([jnp.mean(loss) for loss in task_losses(fwd(params, batch), batch).values()])


def run(batch, tx, *, params=None, state_options=None, steps=1, **options):
    """States and metrics of a few jitted steps."""
    state_options = {k: options[k] for k in ("reparam", "aggregator") if k in options} | (state_options or {})
    params = make_params() if params is None else params
    state = train.init_state(params, tx, rng=jax.random.key(7), **state_options)
    step = jax.jit(train.make_step(options.pop("forward", forward), options.pop("losses", task_losses), tx, **options))
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


def assert_trees(actual, expected, **tolerance):
    jax.tree.map(lambda a, e: close(a, e, **tolerance), actual, expected)


def sgd_step(params, grads, rate=0.1):
    return jax.tree.map(lambda p, g: p - rate * g, params, grads)


def test_plain_step_is_the_optimizer_on_the_summed_loss():
    batch, tx = make_batch(), optax.adam(1e-2)
    state, metrics = run(batch, tx, steps=3)
    params, opt_state = make_params(), tx.init(make_params())
    for _ in range(3):
        value, grads = jax.value_and_grad(lambda p: mean_losses(p, batch).sum())(params)
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
    assert_trees(state.params, params)
    close(metrics["loss"], value)
    close(metrics["grad_norm"], optax.tree.norm(grads))
    assert int(state.step) == 3
    assert int(state.skipped) == 0


@pytest.mark.parametrize("mode", ["auto", "stacked", "lean"])
def test_conflict_free_gradient_of_two_tasks(mode):
    batch = make_batch()
    state, metrics = run(batch, optax.sgd(0.1), aggregator=aggregate.conflict_free(), mode=mode)
    rows = [jax.grad(lambda p, k=k: mean_losses(p, batch)[k])(make_params()) for k in range(2)]
    flat = np.stack([jax.flatten_util.ravel_pytree(row)[0] for row in rows]).astype(np.float64)
    # For two tasks: the sum of each unit gradient's part orthogonal to the other, as long as both projections on it.
    units = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    cosine = units[0] @ units[1]
    parts = [units[0] - cosine * units[1], units[1] - cosine * units[0]]
    direction = sum(part / np.linalg.norm(part) for part in parts)
    direction /= np.linalg.norm(direction)
    update = (flat @ direction).sum() * direction
    expected = jax.flatten_util.ravel_pytree(make_params())[0] - 0.1 * update
    close(jax.flatten_util.ravel_pytree(state.params)[0], expected)
    close(metrics["cosine/class/value"], cosine, atol=1e-5)
    close(metrics["norm/value"], np.linalg.norm(flat[1]))


def test_static_weights_by_one_backward_pass():
    batch = make_batch()
    state, metrics = run(batch, optax.sgd(0.1), aggregator=aggregate.static(jnp.array([2.0, -0.5])))
    grads = jax.grad(lambda p: mean_losses(p, batch) @ jnp.array([2.0, -0.5]))(make_params())
    assert_trees(state.params, sgd_step(make_params(), grads))
    close(metrics["weight/value"], -0.5)


def balanced_by_hand(params, batch, weights):
    """The loss balancer's first step: each output gradient scaled to its share of a total norm of one."""
    outputs, pull = jax.vjp(lambda p: forward(p, batch), params)

    def at_outputs(outputs, k):
        return jnp.mean(list(task_losses(outputs, batch).values())[k])

    total = jax.tree.map(jnp.zeros_like, outputs)
    for k, weight in enumerate(weights):
        row = jax.grad(at_outputs)(outputs, k)
        norms = jnp.sqrt(sum(jnp.sum(jnp.square(x.reshape(BATCH, -1)), 1) for x in jax.tree.leaves(row)))
        scale = weight / sum(weights) / jnp.mean(norms)
        total = jax.tree.map(lambda t, r, s=scale: t + s * r, total, row)
    return pull(total)[0]


@pytest.mark.parametrize("microbatches", [1, 2])
def test_loss_balancer_at_the_outputs(microbatches):
    batch, tx = make_batch(), optax.sgd(0.1)
    outputs = jax.eval_shape(forward, make_params(), batch)
    options = {"aggregator": aggregate.loss_balancer([3.0, 1.0]), "mode": "outputs", "microbatches": microbatches}
    state, _ = run(batch, tx, state_options={"outputs": outputs}, **options)
    assert_trees(state.params, sgd_step(make_params(), balanced_by_hand(make_params(), batch, [3.0, 1.0])))


def test_loss_balancer_goes_back_through_the_model_once():
    batch, tx = make_batch(), optax.sgd(0.1)
    passes = []

    @jax.custom_vjp
    def marked(x):
        return x

    def backward(_, g):
        jax.debug.callback(lambda shape: passes.append(shape), np.asarray(g.shape))
        return (g,)

    marked.defvjp(lambda x: (x, None), backward)

    def marked_forward(params, batch, **kwargs):
        return forward(params | {"hidden": jax.tree.map(marked, params["hidden"])}, batch, **kwargs)

    outputs = jax.eval_shape(forward, make_params(), batch)
    options = {"aggregator": aggregate.loss_balancer([1.0, 1.0]), "state_options": {"outputs": outputs}}
    run(batch, tx, forward=marked_forward, mode="outputs", **options)
    jax.effects_barrier()
    assert len(passes) == len(make_params()["hidden"])  # once for each marked parameter, not once for each task


def test_penalties_are_added_outside_of_the_balance():
    batch, tx = make_batch(), optax.sgd(0.1)
    outputs = jax.eval_shape(forward, make_params(), batch)

    def penalties(params, references):
        del references
        return {"norm": 0.5 * optax.tree.norm(params, squared=True)}

    options = {"aggregator": aggregate.loss_balancer([1.0, 1.0]), "mode": "outputs", "penalties": penalties}
    state, metrics = run(batch, tx, state_options={"outputs": outputs}, **options)
    balanced = balanced_by_hand(make_params(), batch, [1.0, 1.0])
    assert_trees(state.params, sgd_step(make_params(), jax.tree.map(jnp.add, balanced, make_params())))
    close(metrics["loss/norm"], 0.5 * optax.tree.norm(make_params(), squared=True))


@pytest.mark.parametrize("microbatches", [1, 4])
def test_sam_takes_the_gradient_at_the_perturbed_point(microbatches):
    batch = make_batch()
    wrap = functools.partial(optim.sam_value_and_grad, rho=0.3)
    state, metrics = run(batch, optax.sgd(0.1), value_and_grad=wrap, microbatches=microbatches)

    def loss(params):
        return mean_losses(params, batch).sum()

    params = make_params()
    grads = jax.grad(loss)(params)
    scale = 0.3 / optax.tree.norm(grads)
    second = jax.grad(loss)(jax.tree.map(lambda p, g: p + scale * g, params, grads))
    assert_trees(state.params, sgd_step(params, second), rtol=2e-5)
    close(metrics["loss"], loss(params))


def test_sam_of_every_task_under_an_aggregator():
    batch = make_batch()
    wrap = functools.partial(optim.sam_value_and_grad, rho=0.3)
    state, _ = run(batch, optax.sgd(0.1), value_and_grad=wrap, aggregator=aggregate.mean(), mode="stacked")
    params = make_params()
    total = jax.tree.map(jnp.zeros_like, params)
    for k in range(2):
        grads = jax.grad(lambda p, k=k: mean_losses(p, batch)[k])(params)
        scale = 0.3 / optax.tree.norm(grads)
        moved = jax.tree.map(lambda p, g, s=scale: p + s * g, params, grads)
        second = jax.grad(lambda p, k=k: mean_losses(p, batch)[k])(moved)
        total = jax.tree.map(lambda t, g: t + g / 2, total, second)
    assert_trees(state.params, sgd_step(params, total), rtol=2e-5)


def pgd(params, batch, references, rng, *, steps=3, size=0.05, epsilon=0.1):
    """Projected gradient ascent on the inputs: a batch that depends on the parameters."""
    del references
    start = jax.random.uniform(rng, batch["x"].shape, minval=-epsilon, maxval=epsilon)

    def ascend(_, delta):
        grads = jax.grad(lambda d: mean_losses(params, batch | {"x": batch["x"] + d}).sum())(delta)
        return jnp.clip(delta + size * jnp.sign(grads), -epsilon, epsilon)

    return batch | {"x": batch["x"] + jax.lax.fori_loop(0, steps, ascend, start)}


def test_adversarial_training_prepares_the_batch():
    batch = make_batch()
    state, metrics = run(batch, optax.sgd(0.1), prepare=pgd)
    start = train.init_state(make_params(), optax.sgd(0.1), rng=jax.random.key(7))
    rng = jax.random.fold_in(jax.random.fold_in(start.rng, 0), 3)
    attacked = pgd(make_params(), batch, {}, rng)
    grads = jax.grad(lambda p: mean_losses(p, attacked).sum())(make_params())
    assert_trees(state.params, sgd_step(make_params(), grads))
    assert metrics["loss"] > mean_losses(make_params(), batch).sum()


def test_learned_step_sizes_chained_with_nm_masks():
    batch, bits, where = make_batch(), 4, r".*(hidden|class)/kernel"
    link = reparam.chain(
        reparam.nm_sparse(2, 4, recipe="ste", where=where),
        reparam.fake_quant("int4", method="lsq", where=where),
    )
    state, _ = run(batch, optax.sgd(0.1), reparam=link)
    start = train.init_state(make_params(), optax.sgd(0.1), rng=jax.random.key(7), reparam=link)
    scales = start.params["fake_quant"]
    assert set(scales) == {"hidden.kernel.scale", "class.kernel.scale"}
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def quantize(masked, scale):
        """Value of LSQ; the gradients below are its published ones."""
        return jnp.clip(jnp.round(masked / scale), low, high) * scale

    params = make_params()
    masks = {n: sparsity.masks.nm_mask(jnp.abs(params[n]["kernel"]), 2, 4) for n in ("hidden", "class")}
    seen = {n: quantize(params[n]["kernel"] * masks[n], scales[f"{n}.kernel.scale"]) for n in masks}
    model = params | {n: params[n] | {"kernel": seen[n]} for n in masks}
    grads = jax.grad(lambda p: mean_losses(p, batch).sum())(model)
    for n, mask in masks.items():
        scale, g = scales[f"{n}.kernel.scale"], grads[n]["kernel"]
        ratio = params[n]["kernel"] * mask / scale
        inside = (ratio >= low) & (ratio <= high)
        expected = params[n]["kernel"] - 0.1 * jnp.where(inside, g, 0.0)
        close(state.params["base"][n]["kernel"], expected)
        slope = jnp.where(inside, jnp.round(ratio) - ratio, jnp.clip(ratio, low, high))
        damping = 1 / np.sqrt(high * ratio.size / scale.size)
        # One scale for each output channel: the sum over the inputs.
        expected_scale = scale - 0.1 * damping * jnp.sum(g * slope, axis=0, keepdims=True)
        close(state.params["fake_quant"][f"{n}.kernel.scale"], jnp.maximum(expected_scale, 1e-5))
    close(state.params["base"]["value"]["kernel"], params["value"]["kernel"] - 0.1 * grads["value"]["kernel"])


def test_weights_of_examples_depend_on_their_losses_and_are_remembered():
    batch = make_batch()

    def weigh(table, indices, per_example):
        seen = table["loss"].at[indices].set(per_example["class"])
        weights = per_example["class"] / (1.0 + table["loss"][indices])
        return {"class": weights}, {"loss": seen}

    table = {"loss": jnp.arange(2.0 * BATCH)}
    state, _ = run(batch, optax.sgd(0.1), weigh=weigh, state_options={"example_state": table})
    params = make_params()
    per_example = task_losses(forward(params, batch), batch)["class"]
    weights = per_example / (1.0 + table["loss"][batch["index"]])

    def loss(params):
        terms = task_losses(forward(params, batch), batch)
        return jnp.sum(weights * terms["class"]) / BATCH + jnp.mean(terms["value"])

    assert_trees(state.params, sgd_step(params, jax.grad(loss)(params)))
    close(state.example_state["loss"][batch["index"]], per_example)
    close(state.example_state["loss"][BATCH:], table["loss"][BATCH:])


@losses.with_example_state
def remembered_losses(outputs, batch, table):
    per_example = task_losses(outputs, batch)
    seen = table.at[batch["index"]].set(per_example["class"])
    return per_example | {"class": table[batch["index"]] * per_example["class"]}, seen


@pytest.mark.parametrize("microbatches", [1, 4])
def test_losses_may_keep_a_value_for_each_example(microbatches):
    batch, params, table = make_batch(), make_params(), jnp.arange(2.0 * BATCH)
    step = train.make_step(forward, remembered_losses, optax.sgd(0.1), microbatches=microbatches)
    start = train.init_state(params, optax.sgd(0.1), rng=jax.random.key(0), example_state=table)
    state, metrics = jax.jit(step)(start, batch)
    per_example = task_losses(forward(params, batch), batch)["class"]
    close(state.example_state, table.at[batch["index"]].set(per_example))
    close(metrics["loss/class"], jnp.mean(table[batch["index"]] * per_example))

    def loss(params):
        terms = task_losses(forward(params, batch), batch)
        return jnp.mean(table[batch["index"]] * terms["class"]) + jnp.mean(terms["value"])

    assert_trees(state.params, sgd_step(params, jax.grad(loss)(params)))


def test_losses_that_need_a_table_say_so():
    step = train.make_step(forward, remembered_losses, optax.sgd(0.1))
    state = train.init_state(make_params(), optax.sgd(0.1), rng=jax.random.key(0))
    with pytest.raises(ValueError, match=r"example_state="):
        step(state, make_batch())


@pytest.mark.parametrize("microbatches", [2, 4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aggregator": aggregate.conflict_free()},
        {"aggregator": aggregate.conflict_free(), "mode": "lean"},
        {"aggregator": aggregate.from_losses(lambda values, state: (values / values.sum(), state))},
        {"weigh": lambda table, indices, per_example: per_example["class"] ** 2},
        {"penalties": lambda params, references: {"class": optax.tree.norm(params, squared=True)}},
        {"measure": lambda outputs, batch: {"accuracy": jnp.argmax(outputs["logits"], -1) == batch["label"]}},
    ],
    ids=["sum", "stacked", "lean", "weights", "weigh", "penalty", "measure"],
)
def test_microbatches_change_nothing_but_rounding(microbatches, options):
    batch = make_batch()
    whole, whole_metrics = run(batch, optax.sgd(0.1), **options)
    parts, parts_metrics = run(batch, optax.sgd(0.1), microbatches=microbatches, **options)
    # conflict_free divides by small eigenvalues of the Gramian: rounding grows by its condition number.
    assert_trees(parts.params, whole.params, rtol=2e-4, atol=2e-6)
    assert_trees(parts_metrics, whole_metrics, rtol=2e-4, atol=2e-6)


def test_gradients_of_low_precision_parameters_are_accumulated_in_float32():
    # 255 ones and one 256 in bfloat16: a bfloat16 sum stops at 256, whichever comes first.
    rows = 256
    batch = {"x": jnp.concatenate([jnp.full((1,), 256.0), jnp.ones(rows - 1)]).astype(jnp.bfloat16)}
    params = {"w": jnp.zeros((), jnp.bfloat16)}
    state, _ = run(
        batch,
        optax.sgd(1.0),
        params=params,
        forward=lambda params, batch, *, rng, train: params["w"] * batch["x"],
        losses=lambda outputs, batch: {"sum": outputs},
        microbatches=rows,
    )
    expected = -jnp.asarray((256.0 + rows - 1) / rows).astype(jnp.bfloat16)
    assert state.params["w"] == expected


def test_a_batch_dependent_loss_is_not_split():
    declared = losses.batch_dependent(task_losses)
    with pytest.raises(ValueError, match=r"microbatches=2.*whole batch"):
        train.make_step(forward, declared, optax.sgd(0.1), microbatches=2)
    train.make_step(forward, declared, optax.sgd(0.1))


def test_microbatches_must_divide_the_batch():
    with pytest.raises(ValueError, match="microbatches=3 does not divide the batch of 8"):
        run(make_batch(), optax.sgd(0.1), microbatches=3)


def test_dynamic_loss_scale_finds_a_scale_that_float16_can_hold():
    batch = make_batch()

    def half(params, batch, *, rng, train):
        return forward(
            jax.tree.map(lambda p: p.astype(jnp.float16), params), batch | {"x": batch["x"].astype(jnp.float16)}
        )

    tx = optim.dynamic_loss_scale(optax.sgd(0.1), initial_scale=2.0**20, growth_interval=1000)
    state = train.init_state(make_params(), tx, rng=jax.random.key(7))
    step = jax.jit(train.make_step(half, task_losses, tx, loss_scale=optim.current_loss_scale))
    scales = []
    for _ in range(30):
        state, metrics = step(state, batch)
        scales.append(float(optim.current_loss_scale(state.opt_state)))
        if metrics["skipped"] < len(scales):
            break
    skipped = int(state.skipped)
    assert 0 < skipped < 30
    assert scales[:skipped] == [2.0 ** (19 - i) for i in range(skipped)]
    # The first step that was taken is the hand-written one, up to float16: 11 bits, 5e-4 of a gradient of order one.
    grads = jax.grad(lambda p: mean_losses(p, batch).sum())(make_params())
    assert_trees(state.params, sgd_step(make_params(), grads), rtol=0, atol=5e-4)


def test_a_teacher_and_a_pull_to_an_anchor_come_from_the_references():
    batch = make_batch()
    teacher, anchor = make_params(3), make_params(4)

    def prepare(params, batch, references, rng):
        del params, rng
        return batch | {"teacher": jax.nn.softmax(forward(references["teacher"], batch)["logits"])}

    def distill(outputs, batch):
        return {"distill": losses.softmax_cross_entropy(outputs["logits"], batch["teacher"])}

    def pull(params, references):
        return {"anchor": 0.5 * optax.tree.norm(optax.tree.sub(params, references["anchor"]), squared=True)}

    state, metrics = run(
        batch,
        optax.sgd(0.1),
        losses=distill,
        prepare=prepare,
        penalties=pull,
        state_options={"references": {"teacher": teacher, "anchor": anchor}},
    )
    targets = jax.nn.softmax(forward(teacher, batch)["logits"])

    def loss(params):
        return jnp.mean(losses.softmax_cross_entropy(forward(params, batch)["logits"], targets))

    params = make_params()
    grads = jax.tree.map(lambda g, p, a: g + (p - a), jax.grad(loss)(params), params, anchor)
    assert_trees(state.params, sgd_step(params, grads))
    assert_trees(state.references, {"teacher": teacher, "anchor": anchor}, rtol=0, atol=0)
    close(metrics["loss/distill"], loss(params))


def test_average_of_the_parameters_follows_them():
    batch, decay = make_batch(), 0.6
    state, _ = run(
        batch, optax.sgd(0.1), track=train.ema(decay), steps=3, state_options={"references": {"ema": make_params()}}
    )
    params = average = make_params()
    for _ in range(3):
        params = sgd_step(params, jax.grad(lambda p: mean_losses(p, batch).sum())(params))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
    assert_trees(state.references["ema"], average)


def test_gradients_that_are_not_finite_skip_the_update_and_are_counted():
    batch, tx = make_batch(), optax.adam(1e-2)
    step = jax.jit(train.make_step(forward, task_losses, tx, track=train.ema(0.5)))
    state = train.init_state(make_params(), tx, rng=jax.random.key(7), references={"ema": make_params()})
    good, _ = step(state, batch)
    bad, metrics = step(good, batch | {"x": batch["x"].at[0, 0].set(jnp.nan)})
    assert int(metrics["skipped"]) == int(bad.skipped) == 1
    assert int(bad.step) == 2
    unchanged = bad._replace(step=good.step, skipped=good.skipped)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), unchanged, good)
    assert all(jax.tree.leaves(same))
    again, metrics = step(bad, batch)
    assert int(metrics["skipped"]) == 1
    assert not jnp.all(again.params["hidden"]["kernel"] == bad.params["hidden"]["kernel"])


@pytest.mark.parametrize("microbatches", [1, 4])
def test_model_state_and_what_is_counted_over_the_examples(microbatches):
    batch = make_batch()

    def stateful(params, batch, *, rng, train, model_state):
        outputs = forward(params, batch, rng=rng, train=train)
        outputs["aux"] = {"positive": jnp.sum(outputs["logits"] > 0, axis=0)}
        return outputs, model_state | {"seen": model_state["seen"] + batch["x"].shape[0]}

    def after(model_state, aux):
        return model_state | {"bias": model_state["bias"] + jnp.sign(aux["positive"] - BATCH / 2)}

    start = {"seen": jnp.zeros((), jnp.int32), "bias": jnp.zeros(CLASSES)}
    state, _ = run(
        batch,
        optax.sgd(0.1),
        forward=stateful,
        after=after,
        microbatches=microbatches,
        state_options={"model_state": start},
    )
    positive = np.sum(np.asarray(forward(make_params(), batch)["logits"]) > 0, axis=0)
    assert int(state.model_state["seen"]) == BATCH
    close(state.model_state["bias"], np.sign(positive - BATCH / 2))


def test_masks_reach_the_optimizer_and_projection_vetoes():
    batch = make_batch()
    masks = sparsity.masks.nm_mask(jnp.abs(make_params()["hidden"]["kernel"]), 2, 4)
    tree = {"hidden": {"kernel": masks, "bias": None}, "class": {"kernel": None}, "value": {"kernel": None}}
    tx = optax.chain(optim.decay_gradient_flow(0.25), optax.sgd(0.1))
    state, _ = run(batch, tx, reparam=reparam.masked(tree, backward="straight_through"))
    params = make_params()
    model = params | {"hidden": params["hidden"] | {"kernel": params["hidden"]["kernel"] * masks}}
    grads = jax.grad(lambda p: mean_losses(p, batch).sum())(model)["hidden"]["kernel"]
    close(state.params["hidden"]["kernel"], params["hidden"]["kernel"] - 0.1 * grads * jnp.where(masks, 1.0, 0.25))
    vetoed, _ = run(batch, optax.sgd(0.1), reparam=reparam.masked(tree, backward="chain"))
    assert not jnp.any(vetoed.params["hidden"]["kernel"][~masks])


def test_sharded_over_a_mesh_the_step_is_the_same():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = make_batch()
    options = {"aggregator": aggregate.conflict_free()}
    expected, _ = run(batch, optax.adam(1e-2), steps=2, **options)
    actual, _ = run(jax.device_put(batch, rows), optax.adam(1e-2), steps=2, **options)
    assert_trees(actual.params, expected.params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "stackd"}, "did you mean 'stacked'"),
        ({"mode": "stacked"}, "needs an aggregator"),
        ({"microbatches": 0}, "microbatches=0"),
        ({"mode": "lean", "aggregator": aggregate.mean(), "value_and_grad": lambda fn: fn}, "lean"),
        ({"mode": "outputs", "aggregator": aggregate.mean(), "loss_scale": lambda state: 1.0}, "loss_scale"),
    ],
)
def test_options_that_cannot_be_run_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        train.make_step(forward, task_losses, optax.sgd(0.1), **options)


def test_losses_without_a_task_are_refused():
    with pytest.raises(ValueError, match="no task"):
        run(make_batch(), optax.sgd(0.1), losses=lambda outputs, batch: {})


def test_the_second_step_does_not_compile_again():
    batch, tx = make_batch(), optax.adam(1e-2)
    state = train.init_state(make_params(), tx, rng=jax.random.key(7), aggregator=aggregate.conflict_free())
    step = jax.jit(train.make_step(forward, task_losses, tx, aggregator=aggregate.conflict_free()), donate_argnums=0)
    for _ in range(3):
        state, _ = step(state, batch)
    assert step._cache_size() == 1
