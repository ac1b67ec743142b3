"""Reparameterizations that jobs train under, made from their settings."""

from collections.abc import Callable

from experiments import components
from experiments.compression import methods
from steelyard import reparam, sparsity
from steelyard.reparam import sparsities
from steelyard.sparsity import patterns


def gradual(job: methods.Job) -> reparam.Reparam:
    """From dense to the job's sparsity along a cubic ramp."""
    steps, (start, end) = job.settings["retrain_steps"], job.settings["ramp"]
    start, end = int(start * steps), int(end * steps)
    least = job.option("min_kept") if job.settings["allocation"] == "global" else {}
    return _checked(
        job,
        reparam.pruned,
        job.sparsity,
        schedule=sparsity.schedules.polynomial(job.sparsity, start=start, end=end),
        start=start,
        **({"backward": "chain", "every": max(1, (end - start) // 20)} | job.extras()),
        **job.option("score", "allocation", "pattern", "where"),
        **least,
    )


def recipe(job: methods.Job) -> reparam.Reparam:
    """An N:M pattern that follows the weights."""
    n, m, axis = job.pattern
    where = job.settings["where"] or r"(.*/)?kernel"
    options = {"total_steps": job.settings["retrain_steps"], "axis": axis} | job.extras()
    return _checked(job, reparam.nm_sparse, n, m, recipe=job.settings["recipe"], where=where, **options)


def _checked(job: methods.Job, function: Callable[..., reparam.Reparam], *args, **options) -> reparam.Reparam:
    try:
        return function(*args, **options)
    except (ValueError, TypeError) as error:
        raise components.ConfigError(f"config.methods.{job.method}: {error}") from error


def stored_as_nm(link: reparam.Reparam, pattern: patterns.Pattern) -> reparam.Reparam:
    """Fixed masks of an N:M pattern along the contraction axis are stored as such."""
    return link._replace(finish=lambda stored, state: sparsities.store(stored, state.masks, pattern))
