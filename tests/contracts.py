"""The contract table: everything that the library exports, and how to put it through the tests of `test_contracts.py`.

A line an export: its kind, its name and how to make it. The kind says which contracts hold for it; where one of them
does not apply to an export, `excuses` says why. All kinds are turned into a `Program`, a start and a step on a tree of
parameters and one of gradients, and the tests know nothing else.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from steelyard import aggregate, examples, losses, optim, precision, reparam, sparsity
from steelyard import tree as tree_lib

PyTree = Any

ROOMS = {"optim": optim, "aggregate": aggregate, "losses": losses, "examples": examples, "reparam": reparam}
ROOMS |= {f"sparsity.{name}": getattr(sparsity, name) for name in sparsity.__all__}

CONTRACTS = {
    "jit": "jit gives what running op by op gives",
    "vmap": "a leading axis of independent problems gives each problem's own result",
    "x64": "with 64 bits, float64 leaves stay so and float32 leaves are not widened",
    "dtype": "bfloat16 and float32 leaves keep their dtypes, in updates and in states",
    "none": "`None` leaves stay `None`",
    "scalar": "the tree may be a bare scalar",
    "empty": "the tree may be empty",
    "length_one": "leaves may have length 1",
    "zero": "zero gradients give finite results",
    "frameworks": "parameters may be those of NNX, Equinox and Haiku",
    "sharding": "what is shaped like a parameter stays where the parameter is",
    "extra_args": "unknown extra arguments do no harm and reach what is wrapped or comes later",
    "restore": "a state is saved and restored to the same bits",
    "recompile": "the second step runs the first one's program",
    "donate": "a first state can be donated: no two of its arrays are one",
    "rows": "the loss of an example is its own, whatever the others are",
    "extremes": "losses and gradients are finite for scores up to 1e4, probabilities of 0 and 1, batches of one class",
    "half": "half-precision inputs give what the same inputs give in float32, in float32",
    "shards": "a batch split over 8 devices gives value and gradient of the whole, by jit and by shard_map",
    "padding": "rows outside of `where` count for nothing",
}

_TREE = {"jit", "vmap", "x64", "dtype", "none", "scalar", "empty", "length_one", "zero", "frameworks", "sharding"}
_TREE |= {"recompile"}
KINDS: dict[str, set[str]] = {
    "transform": _TREE | {"extra_args", "restore", "donate"},
    "aggregator": _TREE | {"extra_args", "restore", "donate"},
    "reparam": _TREE | {"restore"},
    "gradient": _TREE,  # instead of jax.value_and_grad
    "tree": _TREE,  # other functions of trees, solvers among them
    "array": {"jit", "vmap", "x64", "dtype", "zero", "recompile"},  # functions of one matrix
    "loss": {"x64", "rows", "extremes", "half"},  # one number an example, or more
    "batch_loss": {"x64", "extremes", "half", "shards", "padding"},  # that depend on the whole batch
    "schedule": {"jit", "vmap", "zero", "recompile"},
    "host": set(),  # runs in Python, before training or after it
    "type": set(),
    "constant": set(),
}


class Program(NamedTuple):
    """An export, set up for a test.

    Attributes:
      init: `params -> carry`, what persists between steps.
      step: `(carry, grads) -> (outputs, carry)`.
    """

    init: Callable[[PyTree], PyTree]
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


class Entry(NamedTuple):
    """A line of the table.

    Attributes:
      name: room and export, as in "optim.adamp".
      kind: one of `KINDS`.
      program: makes the program; `None` for kinds without contracts.
      like_params: whether the outputs are a tree like the parameters.
      excuses: contracts that do not apply to it, with the reason.
      chained: for transformations and aggregators: `inner -> transformation` in which extra arguments must reach
        `inner`, which is wrapped or comes next.
      extra: for these, `params -> extra arguments` that it needs.
      make: for aggregators and losses, `() -> aggregator` or loss.
      targets: for losses, what they are compared with; see `loss`.
      per_anchor: for losses of a batch, whether there is one number a row.
    """

    name: str
    kind: str
    program: Callable[[], Program] | None = None
    like_params: bool = False
    excuses: Mapping[str, str] = {}
    chained: Callable[[Any], Any] | None = None
    extra: Callable[[PyTree], dict[str, Any]] | None = None
    make: Callable[[], Any] | None = None
    targets: str = "labels"
    per_anchor: bool = True

    def __hash__(self):
        """By its name, so that pytest can put the tests of an entry side by side."""
        return hash(self.name)

    @property
    def contracts(self) -> set[str]:
        return KINDS[self.kind] - set(self.excuses)


def under(contract: str) -> list[Entry]:
    """The entries for which a contract is to be tested."""
    return [entry for entry in ENTRIES if contract in entry.contracts]


# Kinds.


def _no_extra(params):
    del params
    return {}


def transform(name, make, *, extra=_no_extra, **rest) -> Entry:
    """`make() -> transformation`; `extra(params)` are the extra arguments it needs."""

    def program():
        tx = optax.with_extra_args_support(make())

        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params, **extra(params))
            return updates, (optax.apply_updates(params, updates), state)

        return Program(lambda params: (params, tx.init(params)), step)

    entry = Entry(name, "transform", program, True, extra=extra, chained=lambda inner: optax.chain(make(), inner))
    return entry._replace(**rest)


def wrapper(name, make, *, extra=_no_extra, **rest) -> Entry:
    """`make(inner) -> transformation`."""
    return transform(name, lambda: make(optax.adam(0.1)), extra=extra, chained=make, **rest)


def rows(params, grads):
    """Three gradients from one, all zero if it is."""
    return jax.tree.map(lambda p, g: jnp.stack([g, g * g / 2, -g * jnp.cos(p).astype(g.dtype)]), params, grads)


_LOSSES = (1.0, 2.0, 3.0)
_NEEDS_LEAVES = {"empty": "the number of gradients is read from the leaves"}


def aggregator(name, make, *, excuses: Mapping[str, str] = {}, **rest) -> Entry:
    """`make() -> aggregator` of three gradients."""

    def program():
        tx = make()

        def step(carry, grads):
            params, state = carry
            update, state = tx.update(rows(params, grads), state, params, losses=jnp.asarray(_LOSSES))
            return update, (params, state)

        return Program(lambda params: (params, tx.init(params)), step)

    def extra(params):
        del params
        return {"losses": jnp.asarray(_LOSSES)}

    entry = Entry(name, "aggregator", program, True, extra=extra, chained=lambda inner: optax.chain(make(), inner))
    return entry._replace(make=make, excuses={**_NEEDS_LEAVES, **excuses}, **rest)


def reparameterization(name, make, **rest) -> Entry:
    """`make() -> Reparam`; a step is one of gradient descent on the stored parameters."""

    def program():
        link = make()

        def step(carry, grads):
            (stored, state), at = carry, dict(step=jnp.int32(1), rng=jax.random.key(0))
            seen, pull = jax.vjp(lambda s: link.apply(s, state, train=True, **at), stored)
            (pulled,) = pull(jax.tree.map(lambda x, g: g.astype(x.dtype), seen, grads))
            stored = link.project(jax.tree.map(lambda x, d: x - d.astype(x.dtype) / 8, stored, pulled), state)
            return seen, (stored, link.update(state, stored, pulled, **at))

        return Program(lambda params: link.init(params, jax.random.key(0)), step)

    return Entry(name, "reparam", program, True)._replace(**rest)


def gradient(name, make, **rest) -> Entry:
    """`make() -> (params, batch) -> grads`."""
    return tree(name, make, like_params=True, kind="gradient", **rest)


def tree(name, make, **rest) -> Entry:
    """`make() -> (params, grads) -> outputs`."""

    def program():
        fn = make()
        return Program(lambda params: params, lambda params, grads: (fn(params, grads), params))

    return Entry(name, "tree", program)._replace(**rest)


def leafwise(name, make, **rest) -> Entry:
    """`make() -> (param, grad) -> output`, on each leaf."""
    return tree(name, lambda: functools.partial(jax.tree.map, make()), **rest)


def array(name, make, **rest) -> Entry:
    """`make() -> (param, grad) -> outputs`, on one matrix."""
    return tree(name, make, kind="array", **rest)


TARGETS = ("labels", "binary", "probabilities")


def summed(fn):
    """`(scores, targets) -> (gradient, losses)` of the sum of all losses, with any options."""

    def value(scores, targets, **options):
        losses = fn(scores, targets, **options)
        return jnp.sum(losses), losses

    return jax.grad(value, has_aux=True)


def loss(name, make, *, targets="labels", kind="loss", **rest) -> Entry:
    """`make() -> (scores [n, classes], targets) -> losses [n, ...]`; a step gives their gradient and the losses.

    With targets "labels" these are integers [n], with "binary" and "probabilities" zeros and ones [n, classes]; with
    "probabilities" the scores are probabilities.
    """
    assert targets in TARGETS, targets

    def program():
        fn = summed(make())

        def step(params, grads):
            scores = jax.nn.sigmoid(params) if targets == "probabilities" else params
            labels = jnp.argmax(grads, -1) if targets == "labels" else (grads > 0).astype(grads.dtype)
            return fn(scores, labels), params

        return Program(lambda params: params, step)

    return Entry(name, kind, program, make=make, targets=targets)._replace(**rest)


def batch_loss(name, make, *, targets="labels", **rest) -> Entry:
    """As `loss`, with `where=` and `axis_name=`; `per_anchor=False` if there are not as many losses as rows."""
    return loss(name, make, targets=targets, kind="batch_loss", **rest)


def schedule(name, make, **rest) -> Entry:
    """`make() -> count -> value`."""

    def program():
        fn = make()
        return Program(lambda params: jnp.zeros((), jnp.int32), lambda count, grads: (fn(count), count + 1))

    return Entry(name, "schedule", program)._replace(**rest)


def host(name, reason) -> Entry:
    return Entry(name, "host", excuses={"all": reason})


def a_type(name) -> Entry:
    return Entry(name, "type")


def constant(name) -> Entry:
    return Entry(name, "constant")


# What the lines below are made of.


def _everywhere(path, leaf) -> bool:
    """A selector that may select nothing, which a pattern may not."""
    del path, leaf
    return True


def _nowhere(path, leaf) -> bool:
    del path, leaf
    return False


def _columns(params):
    """A group for the output channels of each leaf that has any."""
    return [
        sparsity.channels.ChannelGroup(path, x.shape[-1], (sparsity.channels.Member(path, -1),))
        for path, x in tree_lib.flatten(params)
        if x.ndim
    ]


def _without_columns(params, grads):
    columns = zip(_columns(params), (g for g in jax.tree.leaves(grads) if g.ndim), strict=True)
    keep = {group: jnp.sum(g, axis=tuple(range(g.ndim - 1))) > 0 for group, g in columns}
    return sparsity.masks.apply(params, sparsity.channels.mask_tree(params, keep))


def _pst_weight():
    """Factors of a matrix from parts of another."""

    def fn(w, g):
        return reparam.pst_weight(w, g[:, :2], g[:2], g[:, 2:], g[2:4], g[:, 0], g[0], 0.5)

    return fn


_NEEDS_KERNELS = {"scalar": "nothing to prune is an error", "empty": "nothing to prune is an error"}


def _masks(params):
    return jax.tree.map(lambda p: p > 0, params)


def _loss(params, batch):
    """Differs from zero in every entry of both; its gradient is zero where the batch is."""
    return _total(lambda p, b: b * jnp.tanh(p), params, batch)


def _losses(params, batch):
    """Three losses with gradients in different directions."""
    others = (lambda p, b: b * p**2 / 2), (lambda p, b: b**2 * jnp.sin(p))
    return jnp.stack([_loss(params, batch), *(_total(fn, params, batch) for fn in others)])


def _total(fn, *trees):
    sums = jax.tree.map(lambda *leaves: jnp.sum(fn(*map(precision.wide, leaves))), *trees)
    return sum(jax.tree.leaves(sums), start=jnp.float32(0))


def _sam():
    wrapped = optim.sam_value_and_grad(jax.value_and_grad(_loss))
    return lambda params, batch: wrapped(params, batch)[1]


def _weighted():
    fn = aggregate.weighted_gradient(_losses)
    return lambda params, batch: fn(params, jnp.asarray(_LOSSES), batch)[1]


def _aggregated():
    fn = aggregate.value_and_grad(_losses, aggregate.conflict_free())
    return lambda params, batch: fn(params, aggregate.conflict_free().init(params), batch)[1]


def _aggregated_at():
    rule = aggregate.conflict_free()
    fn = aggregate.value_and_grad_at(
        lambda params, batch: jax.tree.map(lambda p: jnp.tanh(precision.wide(p)), params),
        lambda params, z, batch: _losses(z, batch),
        rule,
    )
    return lambda params, batch: fn(params, rule.init(params), batch)[1]


def _cyclic():
    losses = [lambda params, batch, k=k: _losses(params, batch)[k] for k in range(3)]
    rule = aggregate.momentum_conflict_free(3)
    fn = aggregate.value_and_grad_cyclic(losses, rule)

    def third(params, batch):
        """The first update that is not zero."""
        state = rule.init(params)
        for step in range(3):
            _, update, state = fn(params, state, step, batch)
        return update

    return third


def _rows_first(fn):
    return lambda params, grads: fn(rows(params, grads))


def _improvable_gap_rl():
    """So small and so early that it learns in its second step."""
    return aggregate.improvable_gap_rl(
        3, steps_per_epoch=1, base_epoch=0, seed=0, idle_epochs=0, update_every=2, capacity=4, width=4, batch_size=4
    )


def _over_workers(params, grads):
    rule = aggregate.over_workers(aggregate.conflict_free(), "worker")
    fn = jax.vmap(lambda row: rule.update(row, rule.init(row))[0], axis_name="worker")
    return fn(rows(params, grads))


def _exchanged(params, grads):
    def worker(row):
        start = aggregate.ef21_exchange_init(row)
        return aggregate.ef21_exchange(row, start, aggregate.top_k(5), "worker", sparse=False)

    return jax.vmap(worker, axis_name="worker")(rows(params, grads))


def _compressed(compressor):
    return lambda params, grads: compressor(grads)


def _transposed(p, g):
    workers = jnp.stack([p, g])
    return jax.vmap(lambda x: aggregate.transpose_workers(x, "worker"), axis_name="worker")(workers)


def _between_workers(fn):
    return lambda p, g: jax.vmap(lambda x: fn(x, "worker"), axis_name="worker")(jnp.stack([p, g]))


def _hierarchical(p, g):
    fn = functools.partial(aggregate.hierarchical_reduce_scatter, inner_axis="inner", outer_axis="outer")
    return jax.vmap(jax.vmap(fn, axis_name="inner"), axis_name="outer")(jnp.stack([jnp.stack([p, g])] * 2))


def _block_values(p, g):
    del g
    codes, scales = aggregate.block_quantize(p, block_size=6)
    return aggregate.block_dequantize(codes, scales, p.shape, p.dtype)


def _spsa_slope(params, grads):
    # So far apart that the difference keeps its digits.
    return aggregate.spsa_projected_gradient(lambda p: _loss(p, grads), params, jax.random.key(0), epsilon=1.0)


def _spsa_apply(params, grads):
    del grads
    keys = jax.random.split(jax.random.key(0), len(_LOSSES))
    return aggregate.spsa_apply(params, keys, jnp.asarray(_LOSSES), learning_rate=0.1)


def _spsa_round(params, grads):
    del grads
    codes = jnp.asarray([[64, 0], [190, 70]], jnp.uint8)
    return aggregate.spsa_round(params, jax.random.key(0), 1, codes, learning_rate=0.1)


def _uncalibrated(p, g):
    options = dict(hessian=True, products=True, grad_squares=True)
    return sparsity.calibration.init({"kernel": p}, {"inputs": g.T}, **options)


def _calibrated(p, g):
    params, grads = {"kernel": p}, {"kernel": g}
    return sparsity.calibration.update(_uncalibrated(p, g), {"inputs": g.T}, params=params, grads=grads)


def _scored(score):
    return lambda params, grads: score(lambda p: _loss(p, grads), params)


def _flow(params, inputs):
    """Differs from zero in every parameter."""
    return _total(lambda p, x: x * jnp.tanh(p), params, inputs)


def _disturbed(params, grads):
    return sparsity.scores.disturbed_loss(lambda p: _loss(p, grads), jnp.float32(1), jax.random.key(0))(params)


def _zeroth_order(params, grads):
    # So far apart that the difference keeps its digits.
    return sparsity.scores.zeroth_order(lambda p: _loss(p, grads), params, jax.random.key(0), eps=1.0)


def _sparse_average(params, grads):
    masks = _masks(grads)
    return sparsity.soup.sparse_average([sparsity.masks.apply(x, masks) for x in (params, grads)], masks)


def _noisy_counts(p, g):
    del g
    return aggregate.noisy_counts(p > 0, jax.random.key(0), stddev=1.0, sample=2)


def _per_class_losses(p, g):
    return aggregate.per_class_losses(g[:, 0], jnp.arange(len(p)) % 3, 3)


def _private_task_weights(p, g):
    return aggregate.private_task_weights(p > 0, 10 * jnp.abs(g[0]))


def _epoch_means(count):
    return aggregate.epoch_init(3)._replace(step=count)


def _upper(x, y):
    return _loss(x, y) + _loss(y, y)


def _lower(x, y):
    return _total(lambda a, b: (a - b) ** 2 / 2, x, y)


def _bilevel(x, y):
    return optim.bilevel_penalty_gradient(_upper, _lower, x, y, jax.tree.map(jnp.tanh, y), penalty=1.0)


def _bilevel_step(x, y):
    state = optim.BilevelState(x, y, y)
    return optim.bilevel_penalty_step(_upper, _lower, state, penalty=1.0, outer_lr=0.1, inner_lr=0.1, inner_steps=2).x


def _halpern(params, grads):
    """A zero of u - grads."""
    operator = functools.partial(jax.tree.map, lambda g, u: u - g, grads)
    return optim.halpern(operator, params, lipschitz=1.0, num_steps=3).solution


def _random_halpern(params, grads):
    def operator(u, indices):
        return jax.tree.map(lambda g, x: x - g * jnp.mean(indices).astype(g.dtype), grads, u)

    return optim.variance_reduced_halpern(
        operator, params, num_components=4, lipschitz=1.0, num_steps=3, rng=jax.random.key(0)
    ).solution


def _surrogate_step(params, grads):
    return optim.target_surrogate_step(
        lambda p: jnp.stack([_loss(p, grads), 2 * _loss(p, p)]),
        lambda z: jnp.square(z - 1),
        params,
        step_size=0.1,
        inner_steps=2,
        inner=optax.sgd(0.1),
    )


_BLOCKS = ((0, 1, 2, 3), (4, 5, 6, 7))


def _block_scores(p, g):
    return optim.block_scores(g[:, 0], jnp.asarray(_BLOCKS), lipschitz=jnp.ones(2))


def _convex_relu(solve):
    def fn(p, g):
        x = jnp.stack([p[:, 0], jnp.ones_like(p[:, 0])], axis=1)
        patterns = (x @ jnp.asarray([[1, -1, 0.5], [0, 1, -0.2]], x.dtype)).T > 0
        return solve(x, g[:, 0], patterns)

    return fn


def _convex_relu_objective(x, y, patterns):
    v = jnp.ones((len(patterns), x.shape[1]), x.dtype)
    return optim.convex_relu_objective(x, y, patterns, v, 2 * v, beta=0.1)


def _reset(params, grads):
    tx = optax.adam(0.1)
    state = tx.init(params)
    state = optax.tree.map_params(tx, lambda moment, g: g.astype(moment.dtype), state, grads)
    return optim.reset(state, _masks(params), tx=tx)[0].mu


def _online(loss):
    return lambda p, g: loss(p, jnp.cos(g))


def _adjusted(p, g):
    return losses.adjust_logits(p, jnp.argmax(g, -1), scale=2.0, offset=g[0], margin=jnp.abs(g[1]))


def _labelled(loss):
    return lambda p, g: loss(p, jax.nn.softmax(g))


def _one_against_rest(scores, labels):
    return losses.ensemble_calibrated_loss(jnp.where(labels == 0, 1, -1) * scores[:, 0], jax.random.key(0))


def _counted(loss):
    """With classes of different sizes."""
    return lambda s, y: loss(s, y, counts=jnp.arange(1, s.shape[-1] + 1))


def _hashed(scores, labels):
    bits = scores.shape[-1]
    return losses.orthohash_loss(scores, labels, 2 * jnp.eye(bits) - 1)


def _binned(scores, labels):
    """The first score against the class as a number, the others as logits of bins of it."""
    target, edges = labels.astype(scores.dtype), jnp.arange(scores.shape[1] - 2) + 0.5
    return losses.regression_with_classification(scores[:, 0], scores[:, 1:], target, edges=edges)


def _reweighted(scores, targets, **options):
    return losses.macro_auc_univariate(scores, targets, reweight=True, **options)


def _over_batch(loss):
    return functools.partial(loss, axis=0)


def _simpson_gap(p, g):
    dice = functools.partial(losses.soft_dice_loss, axis=0)
    return losses.simpson_gap(dice, (jax.nn.sigmoid(p), jax.nn.sigmoid(g)), batch_size=2)


def _balanced_entropies(p, g):
    return aggregate.balance_entropies(1 + jnp.abs(p[:, 0]), jnp.abs(g[:, 0]))


def _features(p, g):
    probs = jax.nn.softmax(p), jax.nn.softmax(g)
    return examples.trilateral_features(*probs, jnp.eye(4)[jnp.arange(8) % 4], jnp.full(p.shape, 0.25))


def _example_step(params, grads):
    def inner(p, w, batch):
        del batch
        return _total(lambda a, b: jax.nn.sigmoid(b) * a**2 / 2, p, w)

    tx = optax.sgd(0.5)
    step = examples.bilevel_step(inner, _loss, inner_rate=0.1, outer_tx=tx)
    state = examples.BilevelStepState(params, grads, tx.init(grads))
    return step(state, None, params)[0].params


def _experts(scores, labels):
    """The gradient is that of one expert, so that in half precision it is rounded once."""
    others = jnp.zeros_like(scores)
    return losses.ride_loss(jnp.stack([scores, others, others]), labels, margin=0.5, temperature=2.0)


def _subclasses(embeddings, labels, **options):
    return losses.subclass_contrastive(embeddings, labels // 2, labels % 2, labels, **options)


# These use the scores more than once: half precision would round each share of their gradient.


def _paired(embeddings, labels, **options):
    del labels
    embeddings = precision.wide(embeddings)
    return losses.sigmoid_contrastive(embeddings, embeddings[:, ::-1], log_scale=0.1, bias=-1.0, **options)


def _mined(embeddings, labels, **options):
    del labels
    embeddings = precision.wide(embeddings)
    mined = jnp.stack([-embeddings, embeddings[:, ::-1]], 1)
    return losses.info_nce(embeddings, embeddings[:, ::-1], mined, share_negatives=True, **options)


def _graded(embeddings, labels, **options):
    return losses.cosent(embeddings[:, 0], labels, **options)


def _two_heads(embeddings, labels, *, where=None, axis_name=None):
    del labels
    embeddings = precision.wide(embeddings)
    a, b = jnp.stack([embeddings, -embeddings]), jnp.stack([embeddings[:, ::-1], embeddings])
    temperatures = losses.adaptive_temperatures(a, b, axis_name=axis_name)
    return losses.multi_head_contrastive(a, b, temperatures, where=where, axis_name=axis_name)


def _next_negatives(p, g):
    state = examples.NegativeState(jnp.arange(8), jnp.abs(p[:, 0]))
    return examples.refresh_negatives(state, g[:, 0], window=2, num_candidates=9)


def _cluster_temperatures(p, g):
    return examples.cluster_temperatures(g, jnp.arange(8) % 3, 1 + jnp.abs(p[0, :3]), jnp.array([1, 2, 3]))


def _pk_batch(p, g):
    del p
    return examples.pk_batch(jax.random.key(0), jnp.argmax(g, -1), classes=2, per_class=3)


def _spread(scores, labels, **options):
    means = losses.class_means(scores, labels, 5, **options)
    return losses.within_class_spread(scores, labels, means, **options)


def _virtual_features(p, g):
    covariance = p[:, :, None] * p[:, None, :] + jnp.diag(jnp.arange(1, 5)).astype(p.dtype)
    return examples.sample_features(
        jax.random.key(0), examples.Gaussians(g, covariance, jnp.ones(8, int)), jnp.arange(8)
    )


def _saddle(scores, labels):
    del labels
    saddle = losses.bellman_saddle(scores, scores / 2)
    return saddle.primal + saddle.dual


def _trusted(scores, labels, *, where=None, axis_name=None):
    del labels, where
    variance = jnp.var(precision.wide(scores), axis=1)
    return losses.inverse_variance_weights(variance, min_effective=7.0, axis_name=axis_name)


ENTRIES = [
    # optim
    a_type("optim.BilevelState"),
    a_type("optim.ConvexRelu"),
    a_type("optim.DecayGradientFlowState"),
    a_type("optim.DynamicLossScaleState"),
    a_type("optim.GradNormLowRankState"),
    a_type("optim.HalpernResult"),
    a_type("optim.LowBitState"),
    a_type("optim.SoftShrinkageState"),
    a_type("optim.StochasticRoundingState"),
    transform("optim.adamp", lambda: optim.adamp(0.1, weight_decay=0.1)),
    host("optim.adapt_regime", "numbers to numbers"),
    tree("optim.all_finite", lambda: lambda params, grads: optim.all_finite((params, grads))),
    gradient("optim.bilevel_penalty_gradient", lambda: _bilevel),
    tree("optim.bilevel_penalty_step", lambda: _bilevel_step, like_params=True),
    transform("optim.block_coordinate", lambda: optim.block_coordinate(rule="gs")),
    array("optim.block_direction", lambda: lambda p, g: optim.block_direction(g[:, 0], jnp.arange(3), lipschitz=2.0)),
    array("optim.block_scores", lambda: _block_scores),
    wrapper("optim.by_path", lambda inner: optim.by_path({}, default=inner)),
    array("optim.convex_relu_admm", lambda: _convex_relu(functools.partial(optim.convex_relu_admm, num_steps=3))),
    host("optim.convex_relu_network", "the width of the network depends on values"),
    array("optim.convex_relu_objective", lambda: _convex_relu(_convex_relu_objective)),
    host("optim.convex_relu_patterns", "the number of patterns depends on values"),
    tree(
        "optim.current_loss_scale",
        lambda: lambda params, grads: optim.current_loss_scale(optim.dynamic_loss_scale(optax.sgd(0.1)).init(params)),
    ),
    transform("optim.decay_gradient_flow", lambda: optim.decay_gradient_flow(0.5, masks=_masks)),
    wrapper(
        "optim.dynamic_loss_scale",
        optim.dynamic_loss_scale,
        excuses={"dtype": "updates are float32 at least, for master weights"},
    ),
    transform("optim.grad_norm_low_rank", lambda: optim.grad_norm_low_rank(0.1, rank=2)),
    array("optim.greedy_block", lambda: lambda p, g: optim.greedy_block(g[:, 0], 2, diagonal=jnp.ones(8))),
    tree("optim.halpern", lambda: _halpern, like_params=True),
    schedule(
        "optim.infinite_schedule",
        lambda: optim.infinite_schedule(1.0, 0.5, 0.1, warmup_steps=2, cooldown_steps=3),
    ),
    wrapper("optim.low_bit_state", functools.partial(optim.low_bit_state, min_size=16)),
    transform("optim.normalize_by_error", optim.normalize_by_error, extra=lambda params: {"error": jnp.float32(0.25)}),
    schedule("optim.one_cycle_momentum_schedule", lambda: optim.one_cycle_momentum_schedule(10)),
    leafwise("optim.projection_level", lambda: optim.projection_level),
    schedule("optim.refined_schedule", lambda: optim.refined_schedule([1.0, 2.0, 1.5, 1.0])),
    host("optim.refined_schedule_values", "numbers to numbers"),
    tree("optim.reset", lambda: _reset, like_params=True),
    schedule("optim.rewarmed_cosine_schedule", lambda: optim.rewarmed_cosine_schedule(1.0, 0.1, phase_steps=[3, 4])),
    gradient("optim.sam_value_and_grad", _sam),
    transform("optim.scale_by_adamp", lambda: optim.scale_by_adamp(weight_decay=0.1)),
    transform("optim.scale_by_sgdp", lambda: optim.scale_by_sgdp(weight_decay=0.1)),
    transform("optim.sgdp", lambda: optim.sgdp(0.1, weight_decay=0.1)),
    transform("optim.soft_shrinkage", lambda: optim.soft_shrinkage(0.5, where=_everywhere)),
    wrapper("optim.sparse", optim.sparse, extra=lambda params: {"masks": _masks(params)}),
    transform(
        "optim.stochastic_rounding",
        lambda: optim.stochastic_rounding(key=jax.random.key(0)),
        excuses={"dtype": "updates of half precision are float32, so that adding them rounds once"},
    ),
    wrapper("optim.tangent_projection", lambda inner: optim.tangent_projection(inner, weight_decay=0.1)),
    array("optim.target_surrogate", lambda: lambda p, g: optim.target_surrogate(p, jnp.cos(p), g, step_size=0.5)),
    tree("optim.target_surrogate_step", lambda: _surrogate_step, like_params=True),
    tree("optim.variance_reduced_halpern", lambda: _random_halpern, like_params=True),
    # aggregate
    a_type("aggregate.Aggregator"),
    a_type("aggregate.CenteredClipState"),
    a_type("aggregate.DomainPenaltyState"),
    a_type("aggregate.EF21ExchangeState"),
    a_type("aggregate.EF21State"),
    a_type("aggregate.EpochMeans"),
    a_type("aggregate.GradNormState"),
    a_type("aggregate.GroupDROState"),
    a_type("aggregate.ImprovableGapRLState"),
    a_type("aggregate.LossBalancerState"),
    a_type("aggregate.MomentumConflictFreeState"),
    a_type("aggregate.NormalizedLossBalanceState"),
    a_type("aggregate.PCGradState"),
    a_type("aggregate.Report"),
    a_type("aggregate.Sparsifier"),
    a_type("aggregate.SoftmaxWeightingState"),
    a_type("aggregate.UncertaintyWeightingState"),
    a_type("aggregate.WorkerMomentumState"),
    array("aggregate.balance_entropies", lambda: _balanced_entropies),
    array("aggregate.block_dequantize", lambda: _block_values),
    array("aggregate.block_quantize", lambda: lambda p, g: aggregate.block_quantize(p, bits=4, block_size=6)),
    aggregator("aggregate.cagrad", aggregate.cagrad),
    aggregator("aggregate.centered_clip", aggregate.centered_clip),
    aggregator("aggregate.class_normalized", aggregate.class_normalized),
    tree(
        "aggregate.combine",
        lambda: lambda params, grads: aggregate.combine(jnp.asarray(_LOSSES), rows(params, grads)),
        like_params=True,
        excuses=_NEEDS_LEAVES,
    ),
    aggregator("aggregate.conflict_free", aggregate.conflict_free),
    host("aggregate.count_rows", "shapes to a number"),
    array("aggregate.decode_byte", lambda: lambda p, g: aggregate.decode_byte(jnp.abs(100 * p).astype(jnp.uint8))),
    aggregator("aggregate.domain_penalty", lambda: aggregate.domain_penalty(3, steps_per_epoch=1)),
    aggregator("aggregate.dynamic_weight_average", lambda: aggregate.dynamic_weight_average(3, steps_per_epoch=1)),
    array("aggregate.encode_byte", lambda: lambda p, g: aggregate.encode_byte(p)),
    aggregator("aggregate.ef21", lambda: aggregate.ef21(3, aggregate.top_k(5))),
    tree("aggregate.ef21_exchange", lambda: _exchanged, excuses=_NEEDS_LEAVES),
    host("aggregate.ef21_exchange_init", "shapes to zeros"),
    array("aggregate.ef21_step_size", lambda: lambda p, g: aggregate.ef21_step_size(1 + p[0] ** 2, alpha=0.5)),
    schedule("aggregate.epoch", lambda: lambda count: aggregate.epoch(_epoch_means(count), 2)),
    host("aggregate.epoch_init", "a number to zeros"),
    schedule("aggregate.epoch_push", lambda: lambda count: aggregate.epoch_push(_epoch_means(count), jnp.ones(3), 2)),
    tree("aggregate.finite_rows", lambda: _rows_first(aggregate.finite_rows), excuses=_NEEDS_LEAVES),
    aggregator("aggregate.flag", aggregate.flag),
    aggregator("aggregate.from_distances", lambda: aggregate.from_distances(lambda gram, valid: valid / 2)),
    aggregator(
        "aggregate.from_gram", lambda: aggregate.from_gram(lambda gram, losses, state: (jnp.diagonal(gram), state))
    ),
    aggregator("aggregate.from_losses", lambda: aggregate.from_losses(lambda losses, state: (losses, state))),
    aggregator("aggregate.geometric_median", aggregate.geometric_median),
    aggregator("aggregate.gradnorm", lambda: aggregate.gradnorm(3)),
    tree("aggregate.gram", lambda: _rows_first(aggregate.gram), excuses=_NEEDS_LEAVES),
    aggregator("aggregate.group_dro", lambda: aggregate.group_dro(3, step_size=0.5)),
    array("aggregate.hierarchical_reduce_scatter", lambda: _hierarchical),
    aggregator("aggregate.improvable_gap", lambda: aggregate.improvable_gap(3, steps_per_epoch=1, base_epoch=0)),
    aggregator("aggregate.improvable_gap_rl", _improvable_gap_rl),
    aggregator("aggregate.krum", lambda: aggregate.krum(0)),
    aggregator("aggregate.loss_balancer", lambda: aggregate.loss_balancer([1.0, 2.0, 3.0], per_example=False)),
    aggregator("aggregate.mean", aggregate.mean),
    aggregator("aggregate.median", aggregate.median),
    aggregator("aggregate.mgda", aggregate.mgda),
    aggregator("aggregate.momentum_conflict_free", lambda: aggregate.momentum_conflict_free(3)),
    aggregator("aggregate.nash", aggregate.nash),
    aggregator("aggregate.nearest_neighbor", lambda: aggregate.nearest_neighbor(1)),
    tree(
        "aggregate.nearest_neighbor_mixing",
        lambda: _rows_first(lambda stacked: aggregate.nearest_neighbor_mixing(stacked, 1)),
        excuses=_NEEDS_LEAVES,
    ),
    array("aggregate.noisy_counts", lambda: _noisy_counts),
    aggregator("aggregate.normalized_loss_balance", lambda: aggregate.normalized_loss_balance(3)),
    tree("aggregate.over_workers", lambda: _over_workers, excuses=_NEEDS_LEAVES),
    array("aggregate.pairwise_sqdist", lambda: lambda p, g: aggregate.pairwise_sqdist(p @ p.T)),
    aggregator("aggregate.pcgrad", aggregate.pcgrad),
    array("aggregate.per_class_losses", lambda: _per_class_losses),
    array("aggregate.private_task_weights", lambda: _private_task_weights),
    array("aggregate.quantized_all_gather", lambda: _between_workers(aggregate.quantized_all_gather)),
    array("aggregate.quantized_gather", lambda: _between_workers(aggregate.quantized_gather)),
    array("aggregate.quantized_reduce_scatter", lambda: _between_workers(aggregate.quantized_reduce_scatter)),
    aggregator("aggregate.softmax_weighting", lambda: aggregate.softmax_weighting(3)),
    tree("aggregate.spsa_apply", lambda: _spsa_apply, like_params=True),
    schedule("aggregate.spsa_key", lambda: lambda count: aggregate.spsa_key(jax.random.key(0), count, 1)),
    tree("aggregate.spsa_projected_gradient", lambda: _spsa_slope),
    host("aggregate.spsa_replay", "a loop in Python over the rounds of a log"),
    tree("aggregate.spsa_round", lambda: _spsa_round, like_params=True),
    tree("aggregate.random_k", lambda: _compressed(aggregate.random_k(5, jax.random.key(0))), like_params=True),
    tree("aggregate.square_norms", lambda: _rows_first(aggregate.square_norms), excuses=_NEEDS_LEAVES),
    aggregator("aggregate.static", lambda: aggregate.static(jnp.asarray(_LOSSES))),
    aggregator("aggregate.svd_reweight", lambda: aggregate.svd_reweight(2)),
    array("aggregate.svd_weights", lambda: lambda p, g: aggregate.svd_weights(p @ p.T, 2)),
    tree("aggregate.top_k", lambda: _compressed(aggregate.top_k(5)), like_params=True),
    array("aggregate.transpose_workers", lambda: _transposed),
    aggregator("aggregate.trimmed_mean", lambda: aggregate.trimmed_mean(1)),
    aggregator("aggregate.uncertainty_weighting", lambda: aggregate.uncertainty_weighting(3)),
    gradient("aggregate.value_and_grad", _aggregated, excuses=_NEEDS_LEAVES),
    gradient("aggregate.value_and_grad_at", _aggregated_at, excuses=_NEEDS_LEAVES),
    gradient("aggregate.value_and_grad_cyclic", _cyclic, excuses=_NEEDS_LEAVES),
    gradient("aggregate.weighted_gradient", _weighted),
    aggregator("aggregate.worker_momentum", lambda: optax.chain(aggregate.worker_momentum(3), aggregate.mean())),
    tree(
        "aggregate.zero_rows",
        lambda: _rows_first(lambda stacked: aggregate.zero_rows(stacked, jnp.asarray([True, False, True]))),
        excuses=_NEEDS_LEAVES,
    ),
    # losses
    constant("losses.INITIAL_BIAS"),
    constant("losses.INITIAL_LOG_SCALE"),
    a_type("losses.Mixed"),
    a_type("losses.Saddle"),
    loss("losses.adaptive_ldr_loss", lambda: lambda s, y: losses.adaptive_ldr_loss(s, y, 1.0)[0]),
    array("losses.adaptive_temperatures", lambda: lambda p, g: losses.adaptive_temperatures(p[None], g[None])),
    array("losses.adaptive_threshold", lambda: lambda p, g: losses.adaptive_threshold(jax.nn.sigmoid(g) / 4, 4)),
    array("losses.adjust_logits", lambda: _adjusted),
    array("losses.advantage_weights", lambda: lambda p, g: losses.advantage_weights(p)),
    loss("losses.amplify", lambda: lambda p, t: losses.amplify((p - t) ** 2), targets="probabilities"),
    loss("losses.asymmetric_loss", lambda: losses.asymmetric_loss, targets="binary"),
    loss("losses.asymmetric_softmax_loss", lambda: losses.asymmetric_softmax_loss),
    array("losses.balanced_kl", lambda: _online(losses.balanced_kl)),
    host("losses.batch_dependent", "marks a function and returns it"),
    batch_loss("losses.batch_hard_triplet", lambda: losses.batch_hard_triplet),
    loss("losses.bellman_saddle", lambda: _saddle),
    array("losses.best_biased_variance", lambda: lambda p, g: losses.best_biased_variance(g)),
    array("losses.bin_targets", lambda: lambda p, g: losses.bin_targets(p, jnp.sort(g[0]))),
    host("losses.binary_target_codes", "makes a table of signs once"),
    host("losses.box_cox_parameter", "draws one number"),
    array("losses.calibrated_derivatives", lambda: lambda p, g: losses.calibrated_derivatives(p[:, 0], g[:, 0])),
    array("losses.class_counts", lambda: lambda p, g: losses.class_counts(jnp.argmax(g, -1), 4)),
    array("losses.class_means", lambda: lambda p, g: losses.class_means(g, jnp.arange(8) % 3, 4)),
    array("losses.class_weights", lambda: lambda p, g: losses.class_weights(jnp.abs(g[0]))),
    array("losses.cone_cosine", lambda: lambda p, g: losses.cone_cosine(g, jnp.arange(8) % 3, 4)),
    loss("losses.contrastive_pair_loss", lambda: losses.contrastive_pair_loss, targets="binary"),
    loss(
        "losses.corrected_td",
        lambda: lambda s, y: losses.corrected_td(s[:, 0], s[:, 1], s[:, 2], s[:, 3], discount=0.9),
    ),
    batch_loss("losses.cosent", lambda: _graded, per_anchor=False),
    array("losses.cosine_similarity", lambda: _online(losses.cosine_similarity)),
    array("losses.cumulative_logits", lambda: lambda p, g: losses.cumulative_logits(p, g[:4], g[0])),
    loss("losses.cumulative_nll", lambda: losses.cumulative_nll),
    array("losses.cumulative_probabilities", lambda: lambda p, g: losses.cumulative_probabilities(p)),
    schedule("losses.deferred", lambda: functools.partial(losses.deferred, start=1, before=1.0, after=2.0)),
    array("losses.diversity_temperatures", lambda: lambda p, g: losses.diversity_temperatures(1 + g[0] ** 2)),
    loss("losses.encouraging_loss", lambda: losses.encouraging_loss),
    loss(
        "losses.ensemble_calibrated_loss",
        lambda: _one_against_rest,
        excuses={"rows": "a loss of its own for each batch"},
    ),
    array("losses.ensemble_quantile", lambda: lambda p, g: losses.ensemble_quantile(p)),
    array("losses.entropy", lambda: lambda p, g: losses.entropy(g)),
    loss("losses.expectile_loss", lambda: lambda s, y: losses.expectile_loss(s)),
    array(
        "losses.fisher_discriminant_ratio",
        lambda: lambda p, g: losses.fisher_discriminant_ratio(g, jnp.arange(8) % 3, 4),
        excuses={"zero": "there is no ratio to a spread of zero"},
    ),
    array("losses.foreground_prior", lambda: lambda p, g: losses.foreground_prior(1 + g[0, 0] ** 2, 9, 4)),
    array("losses.forward_kl", lambda: _online(losses.forward_kl)),
    array("losses.frame_gap", lambda: lambda p, g: losses.frame_gap(g)),
    array("losses.from_differences", lambda: lambda p, g: losses.from_differences(p)),
    array("losses.fused_penalty", lambda: lambda p, g: losses.fused_penalty(p)),
    array(
        "losses.generalized_gaussian_excess_kurtosis",
        lambda: lambda p, g: losses.generalized_gaussian_excess_kurtosis(0.5 + g * g),
    ),
    loss("losses.generalized_gaussian_nll", lambda: lambda s, y: losses.generalized_gaussian_nll(s, 0.5)),
    array(
        "losses.generalized_gaussian_variance", lambda: lambda p, g: losses.generalized_gaussian_variance(0.5 + g * g)
    ),
    array(
        "losses.guided_loss_scale", lambda: lambda p, g: losses.guided_loss_scale(jnp.mean(g * g), jnp.mean(jnp.abs(p)))
    ),
    array("losses.huber_loss", lambda: losses.huber_loss),
    loss("losses.iif_loss", lambda: _counted(losses.iif_loss)),
    batch_loss("losses.info_nce", lambda: _mined),
    array("losses.inverse_image_frequency", lambda: lambda p, g: losses.inverse_image_frequency(jnp.abs(g[0]) + 1)),
    batch_loss(
        "losses.inverse_variance_weights",
        lambda: _trusted,
        excuses={"padding": "they are shares of a full batch: no `where`"},
    ),
    array("losses.l2_loss", lambda: losses.l2_loss),
    loss("losses.ldam_loss", lambda: _counted(losses.ldam_loss)),
    array("losses.ldam_margins", lambda: lambda p, g: losses.ldam_margins(jnp.abs(g[0]) + 1)),
    loss("losses.ldr_loss", lambda: functools.partial(losses.ldr_loss, temperature=0.5, margin=1.0)),
    array("losses.log_cosh", lambda: losses.log_cosh),
    loss("losses.log_one_minus_p", lambda: losses.log_one_minus_p),
    loss("losses.logit_adjusted_cross_entropy", lambda: _counted(losses.logit_adjusted_cross_entropy)),
    batch_loss("losses.macro_auc_pairwise", lambda: losses.macro_auc_pairwise, targets="binary", per_anchor=False),
    batch_loss("losses.macro_auc_univariate", lambda: _reweighted, targets="binary", per_anchor=False),
    array("losses.max_norm", lambda: lambda p, g: losses.max_norm(g, radius=1.0)),
    array("losses.metric_mixup", lambda: lambda p, g: losses.metric_mixup(jax.random.key(0), g, jnp.arange(8) % 3)),
    batch_loss("losses.multi_head_contrastive", lambda: _two_heads),
    loss("losses.multi_similarity_loss", lambda: losses.multi_similarity_loss, targets="binary"),
    array(
        "losses.multiplicative_logit_adjustment",
        lambda: lambda p, g: losses.multiplicative_logit_adjustment(p, counts=jnp.abs(g[0]) + 1, gamma=0.5),
    ),
    array("losses.nearest_mean_angle", lambda: lambda p, g: losses.nearest_mean_angle(g)),
    array("losses.normalize", lambda: lambda p, g: losses.normalize(g)),
    loss("losses.orthohash_loss", lambda: _hashed),
    array(
        "losses.posthoc_logit_adjustment",
        lambda: lambda p, g: losses.posthoc_logit_adjustment(p, counts=jnp.abs(g[0]) + 1),
    ),
    array("losses.prior_bias", lambda: lambda p, g: losses.prior_bias(jax.nn.sigmoid(g))),
    loss("losses.pseudo_huber", lambda: lambda s, y: losses.pseudo_huber(s, 0.5)),
    schedule("losses.pseudo_huber_delta", lambda: functools.partial(losses.pseudo_huber_delta, total=10)),
    array("losses.pseudo_huber_delta_snr", lambda: lambda p, g: losses.pseudo_huber_delta_snr(jax.nn.sigmoid(g))),
    host("losses.quantile_edges", "as many numbers as the targets allow"),
    batch_loss("losses.ranking_hinge", lambda: losses.ranking_hinge, targets="binary", per_anchor=False),
    loss("losses.regression_with_classification", lambda: _binned),
    array("losses.relu_normalize", lambda: lambda p, g: losses.relu_normalize(g)),
    loss("losses.rescaled_square_loss", lambda: losses.rescaled_square_loss),
    array("losses.reverse_kl", lambda: _online(losses.reverse_kl)),
    loss("losses.ride_loss", lambda: _experts),
    loss("losses.riql_critic_loss", lambda: lambda s, y: losses.riql_critic_loss(s.T, y.astype(s.dtype)).T),
    array("losses.routed_mean", lambda: lambda p, g: losses.routed_mean(jnp.stack([p, g]), g[None, :, 0])),
    array("losses.routing_targets", lambda: lambda p, g: losses.routing_targets(jnp.stack([p, g]), jnp.argmax(g, -1))),
    array("losses.sigmoid_binary_cross_entropy", lambda: _labelled(losses.sigmoid_binary_cross_entropy)),
    batch_loss(
        "losses.sigmoid_contrastive", lambda: _paired, excuses={"padding": "padding would be negatives: no `where`"}
    ),
    array("losses.sigmoid_focal_loss", lambda: _labelled(losses.sigmoid_focal_loss)),
    host("losses.simplex_frame", "makes a constant from a key"),
    array("losses.simpson_gap", lambda: _simpson_gap),
    array("losses.smooth_labels", lambda: lambda p, g: losses.smooth_labels(jax.nn.softmax(g), 0.1)),
    array("losses.soft_counts", lambda: lambda p, g: losses.soft_counts(jax.nn.sigmoid(p), jax.nn.sigmoid(g), axis=0)),
    batch_loss(
        "losses.soft_dice_loss", lambda: _over_batch(losses.soft_dice_loss), targets="probabilities", per_anchor=False
    ),
    array("losses.soft_threshold", lambda: lambda p, g: losses.soft_threshold(p, 0.5)),
    batch_loss(
        "losses.soft_tversky_loss",
        lambda: _over_batch(losses.soft_tversky_loss),
        targets="probabilities",
        per_anchor=False,
    ),
    array("losses.softmax_cross_entropy", lambda: _labelled(losses.softmax_cross_entropy)),
    array(
        "losses.softmax_cross_entropy_with_integer_labels",
        lambda: lambda p, g: losses.softmax_cross_entropy_with_integer_labels(p, jnp.argmax(g, -1)),
    ),
    loss("losses.softmax_focal_loss", lambda: losses.softmax_focal_loss),
    loss("losses.spo_plus_targeting", lambda: lambda s, t: losses.spo_plus_targeting(s, t - 0.3), targets="binary"),
    array("losses.squared_error", lambda: losses.squared_error),
    loss("losses.squentropy", lambda: losses.squentropy),
    array("losses.stale_negatives", lambda: losses.stale_negatives),
    batch_loss("losses.subclass_contrastive", lambda: _subclasses),
    batch_loss("losses.supervised_contrastive", lambda: losses.supervised_contrastive),
    array(
        "losses.supervised_contrastive_bound",
        lambda: lambda p, g: losses.supervised_contrastive_bound(jnp.argmax(g, -1), temperature=p[0, 0] ** 2),
    ),
    loss("losses.targeting_regret", lambda: lambda s, t: losses.targeting_regret(s, t - 0.3), targets="binary"),
    loss(
        "losses.targeting_regret_smooth",
        lambda: lambda s, t: losses.targeting_regret_smooth(s, t - 0.3),
        targets="binary",
    ),
    loss(
        "losses.targeting_value",
        lambda: lambda p, t: losses.targeting_value(p, 10 * t, incentive=1.0, contact=0.1),
        targets="probabilities",
    ),
    array("losses.tau_normalize", lambda: lambda p, g: losses.tau_normalize(g)),
    array("losses.td_error", lambda: lambda p, g: losses.td_error(g, 0.9, p, jnp.cos(p))),
    array("losses.to_differences", lambda: lambda p, g: losses.to_differences(p)),
    array("losses.uniform_edges", lambda: lambda p, g: losses.uniform_edges(-1 - g[0, 0] ** 2, p[0, 0] ** 2, 4)),
    array("losses.utilization", lambda: losses.utilization),
    loss("losses.vector_scaling_loss", lambda: _counted(losses.vector_scaling_loss)),
    host("losses.with_example_state", "marks a function and returns it"),
    batch_loss("losses.within_class_spread", lambda: _spread),
    # examples
    a_type("examples.BilevelStepState"),
    a_type("examples.FusionRatio"),
    a_type("examples.Gaussians"),
    a_type("examples.NegativeState"),
    host("examples.balanced_clusters", "clusters in NumPy until no point moves"),
    tree("examples.bilevel_step", lambda: _example_step, like_params=True),
    host("examples.bind_batches", "indices to indices"),
    host("examples.binding_examples", "labels of a data set to indices"),
    host("examples.class_gaussians", "estimates on the host, in float64"),
    array("examples.class_means", lambda: lambda p, g: examples.class_means(jax.nn.softmax(g), jnp.arange(8) % 3, 4)),
    array("examples.cluster_temperatures", lambda: _cluster_temperatures),
    array("examples.pk_batch", lambda: _pk_batch),
    array(
        "examples.refresh_negatives",
        lambda: _next_negatives,
        excuses={"zero": "the score of a window just chosen is -inf until it is known"},
    ),
    array("examples.sample_features", lambda: _virtual_features),
    array("examples.subclass_count", lambda: lambda p, g: examples.subclass_count(100 * jnp.abs(g[0]))),
    array("examples.trilateral_features", lambda: _features),
    # reparam
    a_type("reparam.Curve"),
    a_type("reparam.Factors"),
    a_type("reparam.Reparam"),
    a_type("reparam.WeightNormed"),
    reparameterization(
        "reparam.cast", reparam.cast, excuses={"dtype": "it is what it changes", "x64": "it is what it changes"}
    ),
    reparameterization(
        "reparam.chain",
        lambda: reparam.chain(reparam.masked(_masks), reparam.fake_quant("int8", where=_everywhere)),
    ),
    leafwise("reparam.compand", lambda: lambda p, g: reparam.compand(p), like_params=True),
    reparameterization(
        "reparam.dynamic_sparse",
        lambda: reparam.dynamic_sparse("uniform", sparsity=0.5, grow="momentum", every=1, end=9),
        excuses=_NEEDS_KERNELS,
    ),
    leafwise("reparam.expand", lambda: lambda p, g: reparam.expand(p), like_params=True),
    reparameterization("reparam.fake_quant", lambda: reparam.fake_quant("int8", where=_everywhere)),
    reparameterization("reparam.identity", reparam.identity),
    leafwise("reparam.lsq", lambda: lambda p, g: reparam.lsq(p, jnp.float32(0.1), bits=8), like_params=True),
    leafwise("reparam.lsq_init", lambda: lambda p, g: reparam.lsq_init(g, bits=8)),
    reparameterization("reparam.masked", lambda: reparam.masked(_masks, backward="chain")),
    reparameterization("reparam.nm_sparse", lambda: reparam.nm_sparse(2, 4, where=_everywhere)),
    reparameterization("reparam.only", lambda: reparam.only(reparam.masked(_masks), _everywhere)),
    reparameterization(
        "reparam.pruned",
        lambda: reparam.pruned(0.5, score="saliency", backward="chain"),
        excuses=_NEEDS_KERNELS,
    ),
    reparameterization("reparam.pst", lambda: reparam.pst(0.5, rank=2, mask_rank=1)),
    array("reparam.pst_weight", _pst_weight),
    leafwise("reparam.soft_masked", lambda: lambda p, g: reparam.soft_masked(p, p > 0, 0.5), like_params=True),
    leafwise("reparam.sr_ste", lambda: lambda p, g: reparam.sr_ste(p, p > 0), like_params=True),
    leafwise("reparam.straight_through", lambda: lambda p, g: reparam.straight_through(p, p > 0), like_params=True),
    reparameterization("reparam.weight_compander", lambda: reparam.weight_compander(learn=True)),
    reparameterization("reparam.weight_norm", reparam.weight_norm),
    array("reparam.weight_norm_data_init", lambda: reparam.weight_norm_data_init),
    array("reparam.weight_norm_merge", lambda: lambda p, g: reparam.weight_norm_merge(p, g[:1])),
    array("reparam.weight_norm_split", lambda: lambda p, g: reparam.weight_norm_split(g)),
    # sparsity.allocation
    host("sparsity.allocation.coarse_to_fine", "NumPy, before training"),
    array(
        "sparsity.allocation.distortion_curves",
        lambda: lambda p, g: sparsity.allocation.distortion_curves(lambda w, x: x.T @ w, p, g, (0.0, 0.5)),
    ),
    host("sparsity.allocation.erdos_renyi", "shapes to Python numbers"),
    host("sparsity.allocation.lamp", "counts of concrete arrays as Python numbers"),
    array(
        "sparsity.allocation.minimum_kept",
        lambda: lambda p, g: sparsity.allocation.minimum_kept(jnp.abs(jnp.tanh(g[0])), (9, 8, 7, 6), 0.5, 3),
    ),
    host("sparsity.allocation.rate_distortion", "NumPy, before training"),
    host("sparsity.allocation.uniform", "shapes to Python numbers"),
    host("sparsity.allocation.uniform_plus", "shapes to Python numbers"),
    array(
        "sparsity.allocation.water_fill",
        lambda: lambda p, g: sparsity.allocation.water_fill(jnp.abs(g[0]), jnp.abs(p[0]), 0.5),
    ),
    # sparsity.calibration
    a_type("sparsity.calibration.Statistics"),
    a_type("sparsity.calibration.Window"),
    host("sparsity.calibration.collect", "it takes batches one after the other from Python; its step is `update`"),
    array("sparsity.calibration.hessian", lambda: lambda p, g: sparsity.calibration.hessian(_calibrated(p, g))),
    array("sparsity.calibration.init", lambda: lambda p, g: _uncalibrated(p, g)),
    array("sparsity.calibration.input_norm", lambda: lambda p, g: sparsity.calibration.input_norm(_calibrated(p, g))),
    tree(
        "sparsity.calibration.map_kernels",
        lambda: lambda p, g: sparsity.calibration.map_kernels(lambda w, x: w * x, p, g),
        like_params=True,
    ),
    array("sparsity.calibration.update", lambda: _calibrated),
    # sparsity.channels
    a_type("sparsity.channels.ChannelGroup"),
    a_type("sparsity.channels.Member"),
    host("sparsity.channels.as_masks", "indices to masks, between training runs"),
    host("sparsity.channels.blocked", "reads a traced program"),
    host("sparsity.channels.describe", "gives text to print"),
    host("sparsity.channels.drop_schedule", "SciPy, before pruning"),
    host("sparsity.channels.infer", "reads a traced program"),
    tree("sparsity.channels.mask_tree", lambda: _without_columns, like_params=True),
    host("sparsity.channels.performance_aware", "goes on with a group or not as losses say"),
    array(
        "sparsity.channels.score",
        lambda: lambda p, g: sparsity.channels.score(jnp.abs(g), _columns(p)[0], combine="sum", normalize="l2"),
    ),
    host("sparsity.channels.select", "how many channels stay becomes a shape"),
    host("sparsity.channels.shrink", "shapes change"),
    host("sparsity.channels.shrink_state", "shapes change"),
    # sparsity.dynamic
    tree(
        "sparsity.dynamic.prune_and_grow",
        lambda: lambda p, g: sparsity.dynamic.prune_and_grow(_masks(p), jax.tree.map(jnp.abs, p), g, 0.5),
    ),
    # sparsity.gating
    array(
        "sparsity.gating.channel_saliency", lambda: lambda p, g: sparsity.gating.channel_saliency(g.reshape(4, 2, 4))
    ),
    array("sparsity.gating.mass_mask", lambda: lambda p, g: sparsity.gating.mass_mask(jnp.abs(g), 0.5)),
    array("sparsity.gating.predictor_loss", lambda: lambda p, g: sparsity.gating.predictor_loss(p, g > 0)),
    array("sparsity.gating.top_mask", lambda: lambda p, g: sparsity.gating.top_mask(jnp.abs(g), 0.5)),
    # sparsity.layers
    host("sparsity.layers.lowest_blocks", "the indices decide which parameters there are"),
    tree(
        "sparsity.layers.remove_blocks",
        lambda: lambda p, g: sparsity.layers.remove_blocks(p, [_everywhere, _nowhere], (1,)),
        like_params=True,
    ),
    tree("sparsity.layers.score_blocks", lambda: lambda p, g: sparsity.layers.score_blocks(g, [_everywhere, _nowhere])),
    # sparsity.lottery
    a_type("sparsity.lottery.Ticket"),
    array("sparsity.lottery.accept", lambda: lambda p, g: sparsity.lottery.accept(p, g, 0.1)),
    host("sparsity.lottery.iterative_pruning", "a loop of trainings in Python"),
    tree(
        "sparsity.lottery.random_search",
        lambda: (
            lambda p, g: sparsity.lottery.random_search(
                lambda q: _loss(q, g), p, _columns(p), density=0.5, trials=2, rng=jax.random.key(0)
            )
        ),
    ),
    tree("sparsity.lottery.rewind", lambda: lambda p, g: sparsity.lottery.rewind(p, _masks(g)), like_params=True),
    # sparsity.masks
    leafwise("sparsity.masks.activation", lambda: lambda p, g: sparsity.masks.activation(p, 0.5), like_params=True),
    tree("sparsity.masks.apply", lambda: lambda p, g: sparsity.masks.apply(p, _masks(g)), like_params=True),
    array("sparsity.masks.block_mask", lambda: lambda p, g: sparsity.masks.block_mask(g, 0.5, (3, 2))),
    array("sparsity.masks.channel_mask", lambda: lambda p, g: sparsity.masks.channel_mask(g, 0.5)),
    tree("sparsity.masks.global_masks", lambda: lambda p, g: sparsity.masks.global_masks(g, 0.5)),
    array("sparsity.masks.mask", lambda: lambda p, g: sparsity.masks.mask(g, 0.5, "block:2x2")),
    tree("sparsity.masks.masks", lambda: lambda p, g: sparsity.masks.masks(g, 0.5)),
    leafwise("sparsity.masks.overlap", lambda: lambda p, g: sparsity.masks.overlap({"leaf": p > 0}, {"leaf": g > 0})),
    array("sparsity.masks.nm_mask", lambda: lambda p, g: sparsity.masks.nm_mask(g, 2, 4)),
    leafwise("sparsity.masks.pack_bits", lambda: lambda p, g: sparsity.masks.pack_bits(g > 0)),
    host("sparsity.masks.summarize", "counts of concrete arrays as Python numbers"),
    leafwise("sparsity.masks.topk_mask", lambda: lambda p, g: sparsity.masks.topk_mask(g, 0.5)),
    array("sparsity.masks.topk_mask_along", lambda: lambda p, g: sparsity.masks.topk_mask_along(g, 0.5)),
    leafwise(
        "sparsity.masks.unpack_bits",
        lambda: lambda p, g: sparsity.masks.unpack_bits(sparsity.masks.pack_bits(g > 0), g.shape),
        excuses={"sharding": "a row of bytes has no axes along which the mask could stay cut"},
    ),
    # sparsity.patterns
    a_type("sparsity.patterns.Block"),
    a_type("sparsity.patterns.Channel"),
    a_type("sparsity.patterns.NM"),
    a_type("sparsity.patterns.Unstructured"),
    host("sparsity.patterns.parse", "a text to a pattern"),
    # sparsity.retrain
    array(
        "sparsity.retrain.masked_lora_weight",
        lambda: lambda p, g: sparsity.retrain.masked_lora_weight(p, g[:, :2], g[:2]),
    ),
    array(
        "sparsity.retrain.scaled_lora_weight",
        lambda: lambda p, g: sparsity.retrain.scaled_lora_weight(p, g[:, :2], g[:2]),
    ),
    host("sparsity.retrain.trainable", "paths to labels, in Python"),
    # sparsity.schedules
    a_type("sparsity.schedules.Frame"),
    schedule(
        "sparsity.schedules.alternating",
        lambda: sparsity.schedules.alternating(sparse_steps=2, dense_steps=1, start=0, end=9),
    ),
    schedule("sparsity.schedules.every", lambda: sparsity.schedules.every(2, 1, 9)),
    schedule("sparsity.schedules.exponential_decay", lambda: sparsity.schedules.exponential_decay(0.1)),
    schedule("sparsity.schedules.iterative", lambda: sparsity.schedules.iterative(0.2)),
    schedule("sparsity.schedules.linear_decay", lambda: sparsity.schedules.linear_decay(0.1)),
    schedule("sparsity.schedules.polynomial", lambda: sparsity.schedules.polynomial(0.9, start=1, end=9)),
    host("sparsity.schedules.structure_frames", "step counts to step counts"),
    # sparsity.scores
    tree("sparsity.scores.disturbed_loss", lambda: _disturbed),
    tree(
        "sparsity.scores.dual_gradient",
        lambda: lambda p, g: sparsity.scores.dual_gradient(g, p, learning_rate=1.0),
        like_params=True,
    ),
    tree("sparsity.scores.fisher", lambda: sparsity.scores.fisher, like_params=True),
    tree("sparsity.scores.grasp", lambda: _scored(sparsity.scores.grasp), like_params=True),
    tree(
        "sparsity.scores.lamp",
        lambda: lambda p, g: sparsity.scores.lamp(g, where=_everywhere),
        like_params=True,
        excuses={"sharding": "the sort of a leaf gathers it"},
    ),
    array(
        "sparsity.scores.lora",
        lambda: lambda p, g: sparsity.scores.lora(p, g[:, :2], g[:2], p[:, :2], p[:2]),
        like_params=True,
    ),
    tree("sparsity.scores.magnitude", lambda: lambda p, g: sparsity.scores.magnitude(g), like_params=True),
    tree("sparsity.scores.magnitude_increase", lambda: sparsity.scores.magnitude_increase, like_params=True),
    tree("sparsity.scores.movement", lambda: sparsity.scores.movement, like_params=True),
    array(
        "sparsity.scores.obs",
        lambda: lambda p, g: sparsity.scores.obs(p, g @ g.T + jnp.eye(len(g)), damping=0.0),
        like_params=True,
    ),
    tree("sparsity.scores.prefer", lambda: lambda p, g: sparsity.scores.prefer(g, _masks(p)), like_params=True),
    tree(
        "sparsity.scores.random",
        lambda: lambda p, g: sparsity.scores.random(g, jax.random.key(0)),
        like_params=True,
        excuses={
            "dtype": "draws in half precision would often be equal, and the lower index would be kept",
            "sharding": "they depend on no parameter, so that they are drawn where they are used",
        },
    ),
    tree("sparsity.scores.saliency", lambda: sparsity.scores.saliency, like_params=True),
    tree("sparsity.scores.snip", lambda: _scored(sparsity.scores.snip), like_params=True),
    tree(
        "sparsity.scores.synflow",
        lambda: lambda p, g: sparsity.scores.synflow(_flow, p, g),
        like_params=True,
        excuses={"dtype": "the flow grows with every layer: it is kept in float32 at least"},
    ),
    tree("sparsity.scores.taylor", lambda: sparsity.scores.taylor, like_params=True),
    array("sparsity.scores.wanda", lambda: lambda p, g: sparsity.scores.wanda(p, g[:, 0]), like_params=True),
    tree("sparsity.scores.zeroth_order", lambda: _zeroth_order),
    # sparsity.soup
    a_type("sparsity.soup.Soup"),
    tree("sparsity.soup.sparse_average", lambda: _sparse_average, like_params=True),
    host("sparsity.soup.sparse_soups", "a loop of trainings in Python"),
]
