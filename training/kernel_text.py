"""The same text for the same kernel, so that Mosaic compiles it once for all programs of a process.

jax 0.11 writes into a kernel's text a name for dumps, which counts the kernels lowered so far. By
its text a kernel is found again, in Mosaic's store of what it compiled and in jax's on disk; with
the count in it never. From 0.12 on the name is left out there too.
"""

from typing import Any

import jax
from jax.experimental.mosaic.gpu import core

_NAME = "mosaic_gpu.dump_basename"


def leave_out_counts() -> None:
    """From here on the text of a kernel says what it computes alone."""
    if jax.__version_info__ < (0, 12) and not hasattr(core._run_serde_pass, "__wrapped__"):
        core._run_serde_pass = _nameless(core._run_serde_pass)


def _nameless(serialized: Any) -> Any:
    def call(module: Any, **options: Any) -> Any:
        found = serialized(module, **options)
        if _NAME in found.operation.attributes:
            del found.operation.attributes[_NAME]
        return found

    call.__wrapped__ = serialized  # type: ignore[attr-defined]
    return call
