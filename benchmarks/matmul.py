"""The chip's matrix rate: TFLOP/s of one large bf16 product of random numbers, the best of a few.

    python -m benchmarks.matmul        prints it

An attention kernel is two such products and more: what it reaches is to be read beside this.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["measured_apart", "rate"]

_SIZE, _CALLS = 8192, 20


def rate() -> float:
    """TFLOP/s of an 8192 x 8192 x 8192 product on the default device, median of 20 calls."""
    import jax
    import numpy as np
    from jax.experimental.mosaic.gpu import profiler

    a, b = jax.random.normal(jax.random.key(0), (2, _SIZE, _SIZE), "bfloat16")
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(a, b))
    _, times = profiler.measure(product, iterations=_CALLS)(a, b)
    if times is None:
        raise RuntimeError("the profiler saw no kernel")
    return float(2 * _SIZE**3 / np.median(times) / 1e9)


def measured_apart() -> float | None:
    """The rate, from a process of its own in which XLA may try products; None if that fails."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment.pop("XLA_FLAGS", None)
    try:
        found = subprocess.run(
            [sys.executable, "-m", "benchmarks.matmul"],
            cwd=Path(__file__).resolve().parents[1],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return float(found.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


if __name__ == "__main__":
    print(f"{rate():.1f}")
