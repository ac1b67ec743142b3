"""Images per second through the batcher alone."""

import time

from steelyard import data


def bench() -> None:
    """Images per second through the batcher alone."""
    source = data.load("digits")
    batch, count = 256, 4000
    for _ in range(2):  # the first round warms up
        start = time.perf_counter()
        for _ in data.batches(source, batch=batch, seed=0, num_steps=count):
            pass
        seconds = time.perf_counter() - start
    print(f"  digits in batches of {batch}: {batch * count / seconds / 1e6:.2f} million images/s")
