"""What the Hopper kernels cannot do. Importing this imports no kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pallas_kernels.hopper.bias_form import copied_bytes, form_of, sums_gradient, writes_gradient
from pallas_kernels.hopper.copies import padded_width

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = [
    "backward_tangent_refusals",
    "has_dq_apart",
    "key_tangent_refusals",
    "leaves_backward",
    "portable_part",
    "refusals",
    "tangent_refusals",
    "words_bytes",
    "writes_dq_once",
]

MOST_BLOCKS = 2**31 - 1  # of a launch; CUDA C++ Programming Guide, "Technical specifications"
MOST_TANGENT_HEAD_DIM = 128  # beside the tangents, more leaves no shared memory for a ring
# Sums of 64 keys and four tiles of logits take this many registers of a thread's 240, and 128.
MOST_KEY_TANGENT_HEAD_DIM = 64
FEW_QUERIES = 128  # a dense mask does without packing of heads and splitting of keys
MOST_HEAD_DIM = 256  # wgmma's largest N, and all the registers a warpgroup has for the output
KEYS_OF_A_BLOCK = 128  # of a thread block of the backward kernel of dQ, dK and dV

BIAS_DTYPES = ("bfloat16", "float16", "float32")
MOST_COPIED = 4 << 20  # bytes of a bias that ends within a tile, or as many as queries have


def has_dq_apart(spec: AttentionSpec, *, deterministic: bool) -> bool:
    """Whether dQ has a kernel of its own, and no float32 array that thread blocks add to.

    Beside a whole bias, or where they add in turns, it may have one: see `choose_backward_tiles`.
    """
    deterministic &= not writes_dq_once(spec)
    adds = spec.logits_soft_cap is None and form_of(spec) != "whole"
    return deterministic or _is_wide(spec) or not adds


def writes_dq_once(spec: AttentionSpec) -> bool:
    """Whether each block of queries is visited by one thread block, which sees all its keys.

    Then dQ is neither added to what others made of it nor made by a kernel of its own.
    """
    is_one_tile = spec.keys <= KEYS_OF_A_BLOCK
    adds = spec.logits_soft_cap is None and form_of(spec) != "whole"
    return is_one_tile and not _is_wide(spec) and adds


def leaves_backward(spec: AttentionSpec, *, wants_bias: bool) -> bool:
    """Whether the portable kernels make all gradients of a call that Hopper's forward takes."""
    if spec.bias_shape is None:
        return spec.mask_shape is not None and _is_wide(spec)
    is_narrow = min(spec.head_dim, spec.value_dim) < 64
    return _is_wide(spec) or is_narrow or (wants_bias and form_of(spec) != "whole")


def portable_part(spec: AttentionSpec) -> str:
    """What of a call's gradients the portable kernels make, in words; empty if nothing."""
    if leaves_backward(spec, wants_bias=False):
        return "gradients"
    if leaves_backward(spec, wants_bias=True):
        return "gradients, if the bias's is wanted"
    made = writes_gradient(spec) or sums_gradient(spec)
    return "the bias's gradient" if spec.bias_shape and not made else ""


def words_bytes(spec: AttentionSpec) -> int:
    """Bytes of a dense mask's bits, in words of 32 keys."""
    if spec.mask_shape is None:
        return 0
    b, n, t, s = spec.mask_shape
    return b * n * t * -(-s // 32) * 4


def _is_wide(spec: AttentionSpec) -> bool:
    return max(spec.head_dim, spec.value_dim) > 128


def refusals(spec: AttentionSpec) -> list[str]:
    """Why the kernels cannot do the call, with the values; empty if they can."""
    reasons = []
    if spec.dtype.name not in ("bfloat16", "float16"):
        reasons.append(f"its Hopper kernel takes bfloat16 and float16, not {spec.dtype.name}")
    for name, size in {"head dim": spec.head_dim, "value head dim": spec.value_dim}.items():
        if size > MOST_HEAD_DIM or size % 8:
            reasons.append(
                f"its Hopper kernel takes a {name} up to {MOST_HEAD_DIM} and a multiple of 8, "
                f"not {size}"
            )
    if spec.mask_shape is not None and spec.queries <= FEW_QUERIES:
        reasons.append(
            f"its Hopper kernel takes a dense mask of more than {FEW_QUERIES} queries, not "
            f"{spec.queries}"
        )
    if spec.bias_shape is not None and (spec.mask_shape is not None or spec.dropout_rate > 0):
        reasons.append("its Hopper kernel takes no bias beside a dense mask or dropout")
    if spec.bias_dtype is not None and (given := spec.bias_dtype.name) not in BIAS_DTYPES:
        reasons.append(f"its Hopper kernel takes a bias of {', '.join(BIAS_DTYPES)}, not {given}")
    least = min(spec.head_dim, spec.value_dim)
    if form_of(spec) in ("columns", "rows") and least < 64:
        reasons.append(
            "its Hopper kernel takes a bias without queries or keys of its own at head dims from "
            f"64 on, not {least}"
        )
    queries = spec.batch * spec.queries * spec.heads * spec.head_dim * spec.element_bytes
    if (copied := copied_bytes(spec)) > max(queries, MOST_COPIED):
        reasons.append(
            f"its Hopper kernel would copy a bias {spec.bias_shape} whose queries are no multiple "
            f"of 8 or whose keys are none of 16 ({copied / 2**20:.0f} MiB)"
        )
    if (count := spec.tiles(64)) > MOST_BLOCKS:
        reasons.append(f"its Hopper kernel has {count} tiles of 64 rows, more than {MOST_BLOCKS}")
    return reasons


def tangent_refusals(spec: AttentionSpec) -> list[str]:
    """Why the kernel of the output's tangent cannot do the call, with the values."""
    reasons = refusals(spec)
    for name, size in {"head dim": spec.head_dim, "value head dim": spec.value_dim}.items():
        if MOST_TANGENT_HEAD_DIM < size <= MOST_HEAD_DIM:
            reasons.append(
                f"its Hopper kernel of tangents takes a {name} up to {MOST_TANGENT_HEAD_DIM}, "
                f"not {size}"
            )
    if spec.mask_shape is not None or spec.bias_shape is not None or spec.dropout_rate > 0:
        reasons.append("its Hopper kernel of tangents takes no bias, dense mask or dropout")
    return reasons


def backward_tangent_refusals(spec: AttentionSpec) -> list[str]:
    """Why the kernel of the tangent of the query's gradient cannot do the call, with the values."""
    reasons = _gradient_tangent_refusals(spec)
    sizes = (spec.head_dim, spec.value_dim)
    if spec.has_segments and min(map(padded_width, sizes)) > 112:  # full to the last kilobyte
        reasons.append(
            "its Hopper kernel of the gradients' tangents has no shared memory for segments at "
            f"head dims {sizes}"
        )
    return reasons


def key_tangent_refusals(spec: AttentionSpec) -> list[str]:
    """Why the kernel of the tangents of key's and value's gradients cannot, with the values."""
    reasons = _gradient_tangent_refusals(spec)
    sizes = (spec.head_dim, spec.value_dim)
    if max(sizes) > MOST_KEY_TANGENT_HEAD_DIM:
        reasons.append(
            f"its Hopper kernel of keys' tangents takes head dims up to "
            f"{MOST_KEY_TANGENT_HEAD_DIM}, not {sizes}"
        )
    return reasons


def _gradient_tangent_refusals(spec: AttentionSpec) -> list[str]:
    reasons = tangent_refusals(spec)
    if spec.logits_soft_cap is not None:
        reasons.append("its Hopper kernels of the gradients' tangents take no soft cap")
    return reasons
