"""D-Pruner: a byte model of two domains, pruned by what matters for either of them or for both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness, language, training
from steelyard import models, tree
from steelyard.sparsity import calibration, masks, scores

SEEDS = 3
STEPS, RATE = 400, 5e-3
BATCHES, BATCH = 16, 8  # of calibration, for each domain
SPARSITY = 0.5
WHERE = r"block_.*/kernel"
MODEL = models.transformer.Transformer(256, width=32, depth=2, heads=2, mlp_width=64)
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
STRENGTHS = (1e2, 1e3, 1e4, 1e5)
DOMAIN = ("|w g|, batches", "taylor, batches", "|w g|, mean gradient", "taylor, mean gradient")


def dual_gradient() -> tuple[harness.Outcome, ...]:
    """Half of the weights pruned by the dual score: better on both domains together than by either domain's score.

    Direction: the mean of general and domain loss down, against the general score and against the domain score; where
    both hold, neither of them is better on both domains.
    Metric: (loss on held-out general text + loss on held-out domain text) / 2 after pruning, without retraining, in
    thousandths of a nat a byte.
    Budget: byte language models with two blocks of width 32, 400 Adam steps of 8 rows of 64 bytes, half of them general
    (source code), half of the domain (other source code with upper and lower case swapped), at rate 5e-3; calibration
    with 16 batches of 8 training rows for each domain; kernels of the blocks pruned to 50%, each by itself. General
    score: the surgeon's cost with dampings 0.001, 0.01, 0.1, 1. Domain score: |w g| or the Taylor score, summed over
    batches or of the mean gradient. Dual score: Taylor, summed over batches, damping 0.01, strength times squared rate
    1e2, 1e3, 1e4, 1e5 (below which the second term is lost beside the first). 4 configurations each, chosen by the
    losses on calibration rows; 3 seeds.
    """
    domains = language.load()
    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
    params, rows = jax.jit(jax.vmap(functools.partial(_train, domains)))(keys)
    results = jax.jit(jax.vmap(functools.partial(_prune_all, domains)))(params, rows)
    general, domain, dual = (
        _arm({name: values[:, i : i + 4] for name, values in results.items()}, configs)
        for i, configs in zip(
            (0, 4, 8),
            (
                [{"damping": x} for x in DAMPINGS],
                [{"score": x} for x in DOMAIN],
                [{"strength": x} for x in STRENGTHS],
            ),
            strict=True,
        )
    )
    compare = functools.partial(harness.compare, dual, better="less", factor=1000, unit="thousandths of a nat")
    return (
        compare(general, "loss", labels=("dual", "general score"), part="against general"),
        compare(domain, "loss", labels=("dual", "domain score"), part="against domain"),
    )


def _arm(results, configs) -> harness.Arm:
    """The configuration with the least loss on calibration rows."""
    best = int(np.argmin(np.mean(results["calibration"], axis=0)))
    return harness.Arm(configs[best], {name: np.asarray(x[:, best], np.float64) for name, x in results.items()}, 4)


def _loss(params, tokens):
    return training.cross_entropy(MODEL.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:])


def _train(domains: language.Domains, key):
    """A model of both domains, and rows for calibration [2, batches, rows]: general, then domain."""
    keys = jax.random.split(key, 4)
    params = MODEL.init(keys[0], domains.a[:1, :-1])["params"]
    order = language.rows_of(keys[1], STEPS, 0.5)
    params, _, _ = training.fit(lambda p, rows: _loss(p, domains.rows[rows]), params, optax.adam(RATE), order)
    return params, jnp.stack([language.rows_of(k, BATCHES, x) for k, x in zip(keys[2:], (0.0, 1.0), strict=True)])


def _prune_all(domains: language.Domains, params, rows):
    """The losses after pruning by each of the twelve scores."""
    general_text, domain_text = domains.rows[rows]
    kernels, rest = tree.partition(params, WHERE)

    def measure(score):
        kept = jax.tree.map(lambda x: masks.topk_mask(x, SPARSITY), score)
        pruned = tree.combine(masks.apply(kernels, kept), rest)
        seen = jax.lax.map(lambda x: _loss(pruned, x), jnp.concatenate([general_text, domain_text]))
        held_out = _loss(pruned, domains.a), _loss(pruned, domains.b)
        return {"calibration": jnp.mean(seen), "loss": sum(held_out) / 2, "general": held_out[0], "domain": held_out[1]}

    all_scores = _scores(kernels, rest, general_text, domain_text)
    return jax.lax.map(measure, jax.tree.map(lambda *x: jnp.stack(x), *all_scores))


def _scores(kernels, rest, general_text, domain_text):
    """By general text, by domain text and by both, four of each."""
    hessians = calibration.hessian(_statistics(kernels, rest, general_text))
    general = [calibration.map_kernels(functools.partial(scores.obs, damping=x), kernels, hessians) for x in DAMPINGS]
    gradient = jax.grad(lambda k, tokens: _loss(tree.combine(k, rest), tokens))
    grads = jax.lax.map(lambda tokens: gradient(kernels, tokens), domain_text)  # of each batch

    def summed(score):
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(score)(grads))

    def dual(strength):
        def score(g):
            return scores.taylor(kernels, scores.dual_gradient(g, general[1], learning_rate=1.0, strength=strength))

        return summed(score)

    mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
    by_domain = functools.partial(scores.saliency, kernels), functools.partial(scores.taylor, kernels)
    domain = [summed(score) for score in by_domain] + [score(mean) for score in by_domain]
    return general + domain + [dual(strength) for strength in STRENGTHS]


def _statistics(kernels, rest, text):
    def inputs_of(tokens):
        variables = {"params": tree.combine(kernels, rest)}
        return MODEL.apply(variables, tokens[:, :-1], mutable=["intermediates"])[1]["intermediates"]

    start = calibration.init(kernels, jax.eval_shape(inputs_of, text[0]), hessian=True)
    return jax.lax.scan(lambda sums, x: (calibration.update(sums, inputs_of(x)), None), start, text)[0]
