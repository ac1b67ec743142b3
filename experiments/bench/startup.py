"""Seconds from the start of Python until the first step begins to compile."""

import statistics
import subprocess
import sys


def bench() -> None:
    """Seconds from the start of Python until the first step begins to compile."""
    code = (
        "import time, sys; start = time.perf_counter()\n"
        "from experiments import experiment, train\n"
        "from configs import quickstart\n"
        "experiment.programs(experiment.build(quickstart.get_config()))\n"
        "print(time.perf_counter() - start)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    print(f"  imports, data, shapes and shardings of both variants: {statistics.median(seconds):.2f} s")
