"""What the portable kernels cannot do. Importing this imports no kernel."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

import jax

from jattn.call.target import current_target
from pallas_kernels.portable.precision import term_count
from pallas_kernels.portable.shared_memory import shared_kib

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["refusals", "tangent_refusals"]

MOST_HEAD_DIM = 512
MOST_PROGRAMS = 2**31 - 1  # of a launch
# Of float32, by its terms and KiB of shared memory, which a backward tile of 16 by 16 must fit.
MOST_OF_TERMS = {(3, 163): 256, (3, 99): 128, (2, 99): 256}
# The same of tangents, whose kernels hold twice as much; of two-byte floats too.
MOST_OF_TANGENTS = {
    (1, 99): 256,
    (2, 227): 128,
    (2, 163): 128,
    (2, 99): 128,
    (3, 227): 128,
    (3, 163): 128,
    (3, 99): 64,
}
DTYPES = ("bfloat16", "float16", "float32")


def refusals(spec: AttentionSpec) -> list[str]:
    """Why the kernels cannot do the call, with the values; empty if they can."""
    reasons = []
    if not _has_triton():
        reasons.append(
            f"its portable kernel needs Pallas' Triton lowering, which jax {jax.__version__} lacks"
        )
    if spec.dtype.name not in DTYPES:
        reasons.append(f"its portable kernel takes {', '.join(DTYPES)}, not {spec.dtype.name}")
    for name, size in {"head dim": spec.head_dim, "value head dim": spec.value_dim}.items():
        if size > MOST_HEAD_DIM:
            reasons.append(f"its portable kernel takes a {name} up to {MOST_HEAD_DIM}, not {size}")
    kib = shared_kib(current_target().compute_capability)
    size = max(spec.head_dim, spec.value_dim)
    terms = term_count(spec)
    most = MOST_OF_TERMS.get((terms, kib), MOST_HEAD_DIM)
    if most < size <= MOST_HEAD_DIM:
        reasons.append(
            f"its portable kernel takes float32 in {terms} terms up to a head dim of {most}, not "
            f"{size}, where a program has {kib} KiB of shared memory"
        )
    if spec.bias_dtype is not None and spec.bias_dtype.name not in DTYPES:
        reasons.append(
            f"its portable kernel takes a bias of {', '.join(DTYPES)}, not {spec.bias_dtype.name}"
        )
    if (count := spec.tiles(16)) > MOST_PROGRAMS:
        reasons.append(
            f"its portable kernel may have {count} tiles of 16 rows, more than {MOST_PROGRAMS}"
        )
    return reasons


def tangent_refusals(spec: AttentionSpec) -> list[str]:
    """Why the kernels of tangents cannot do the call, with the values; empty if they can."""
    kib = shared_kib(current_target().compute_capability)
    size, terms = max(spec.head_dim, spec.value_dim), term_count(spec)
    reasons = refusals(spec)
    most = MOST_OF_TANGENTS.get((terms, kib), MOST_HEAD_DIM)
    if most < size <= MOST_HEAD_DIM:
        reasons.append(
            f"its portable kernels of tangents take {spec.dtype.name} up to a head dim of {most}, "
            f"not {size}, where a program has {kib} KiB of shared memory"
        )
    return reasons


def _has_triton() -> bool:
    folder = pathlib.Path(jax.__file__).parent
    return (folder / "experimental" / "pallas" / "triton.py").exists()
