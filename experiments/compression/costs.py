"""What a compressed model costs: bytes, multiply-adds, and for a smaller one measured operations and time.

Multiply-adds of the weights are *counted*: entries that are not zero, times how often an example uses each. That is
what a machine that skips every zero would do; it is a count, not a time.
"""

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import experiment as experiment_lib
from experiments.compression.calibration import Weights
from steelyard import formats, models
from steelyard import tree as tree_lib

PyTree = Any
STORED, COMPUTED = "stored", "computed"


def uses(weights: Weights, batch: PyTree | None = None) -> dict[str, float]:
    """Path of a kernel -> how often an example multiplies each of its entries: by the positions of its outputs.

    Args:
      weights: the model; only shapes are looked at.
      batch: a batch of settings["batch"] examples, or its shapes; that of training by default.
    """
    experiment = weights.experiment
    batch = experiment_lib.batch_shapes(experiment) if batch is None else batch
    found = jax.eval_shape(lambda variables, batch: _outputs(experiment, variables, batch), weights.variables, batch)
    times = {}
    for path, y in tree_lib.flatten(found):
        module, method, _ = path.rsplit("/", 2)
        name = {"__call__": "kernel", "attend": "embedding"}.get(method)
        if name is not None:
            times[f"{module}/{name}"] = float(np.prod(y.shape[:-1]) / experiment.settings["batch"])
    return times


def _outputs(experiment: experiment_lib.Experiment, variables: PyTree, batch: PyTree) -> PyTree:
    def is_product(module, method):
        if isinstance(module, models.Embed):
            return method == "attend"
        return isinstance(module, (models.Dense, models.Conv)) and method == "__call__"

    inputs = experiment.task.inputs(batch)
    options = {"capture_intermediates": is_product, "mutable": ["intermediates"]}
    return experiment.model.apply(variables, inputs, train=False, **options)[1]["intermediates"]


def multiply_adds(params: PyTree, times: Mapping[str, float]) -> float:
    """Products of an example with weights that are not zero."""
    return float(sum(np.count_nonzero(w) * times[path] for path, w in tree_lib.flatten(params) if path in times))


def stored_bytes(packed: PyTree, masked: Collection[str]) -> tuple[int, str]:
    """Bytes of the weights, and whether they are stored so.

    A weight node is taken as it is. Of an array at the paths `masked` the smaller of two counts: as it is, or its
    entries other than zero and a bit for each; no format here stores the latter, so that the sum is then called
    computed.
    """
    total, is_stored = 0, True
    for path, leaf in tree_lib.flatten(packed, is_leaf=formats.is_weight):
        whole = formats.nbytes(leaf)
        sparse = whole
        if path in masked and not formats.is_weight(leaf):
            sparse = int(jnp.count_nonzero(leaf)) * leaf.dtype.itemsize + -(-leaf.size // 8)
        total += min(whole, sparse)
        is_stored &= whole <= sparse
    return total, STORED if is_stored else COMPUTED


def forward(weights: Weights) -> tuple[Callable[[], Any], float]:
    """The compiled forward pass of a batch, and its operations as the compiler counts them."""
    experiment = weights.experiment
    batch = experiment_lib.batch_shapes(experiment)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), batch)
    inputs = experiment.task.inputs(zeros)
    # On one device, whatever the mesh: the time of a batch there.
    variables = jax.device_put(jax.device_get(weights.variables), jax.devices()[0])
    function = jax.jit(lambda variables, x: experiment.model.apply(variables, x, train=False))
    compiled = function.lower(variables, inputs).compile()
    return lambda: compiled(variables, inputs), float(compiled.cost_analysis()["flops"])


def latencies(functions: Mapping[str, Callable[[], Any]], repeats: int = 20) -> dict[str, float]:
    """Median milliseconds of each, all of them in turn, so that what disturbs the machine disturbs them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    for _ in range(repeats):
        for name, function in functions.items():
            before = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - before)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


BINS = np.arange(-6.0, 2.01, 0.1)  # of log10 |w|


def histogram(params: PyTree, paths: set[str]) -> list[int]:
    """How many entries of the leaves, zeros left out, lie in each of BINS."""
    values = [np.abs(np.asarray(w)).ravel() for path, w in tree_lib.flatten(params) if path in paths]
    logs = np.log10(np.concatenate([x[x > 0] for x in values])) if values else np.zeros(0)
    return np.histogram(np.clip(logs, BINS[0], BINS[-1]), BINS)[0].tolist()
