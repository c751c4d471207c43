"""H200s that are not there, to compile for. Imported before jax, it sets what the plugin reads."""

from __future__ import annotations

import os
from functools import partial

os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

from tests.absent import gpus, held_back

__all__ = ["h200s", "standard_output"]

h200s = partial(gpus, "h200")
standard_output = partial(held_back, "stdout")  # where Mosaic has the assembler's words
