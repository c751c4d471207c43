"""GPUs that are not there, to compile for. Imported before jax, it sets what XLA reads."""

from __future__ import annotations

import os
from functools import partial

# The assembler's words come through XLA's log, and only where something is spilled.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
os.environ["XLA_FLAGS"] = "--xla_gpu_ptx_compiler_extra_flags=-v"

from tests.absent import gpus, held_back

__all__ = ["gpus", "standard_error"]

standard_error = partial(held_back, "stderr")
