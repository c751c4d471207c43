"""How a bias comes to the Hopper kernels, by what it has along queries and keys."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Literal

from pallas_kernels.hopper.copies import copyable, padded_width

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = [
    "FOLDED",
    "Form",
    "copied_bytes",
    "d_bias_sharers",
    "folds",
    "form_of",
    "has_ring",
    "lends_memory",
    "padding",
    "rows_share",
    "sums_gradient",
    "writes_gradient",
]

FOLDED = 16  # columns of keys: the least that a product of 16 bits sums over

type Form = Literal["whole", "columns", "rows"]


def form_of(spec: AttentionSpec) -> Form | None:
    """ "whole" (.., T, S), "columns" (.., 1, S) or "rows" (.., T, 1); None if there is no bias."""
    if spec.bias_shape is None:
        return None
    _, _, t, s = spec.bias_shape
    if s == 1 and spec.keys > 1:
        return "rows"
    # One query's bias is all there is, also where several heads' queries make a tile.
    return "columns" if t == 1 and spec.queries > 1 else "whole"


def folds(spec: AttentionSpec) -> bool:
    """Whether columns may come into the logits by Q Kᵀ itself: see `folded_bias.py`."""
    base_2 = spec.scale is not None and spec.scale > 0 and spec.logits_soft_cap is None
    return form_of(spec) == "columns" and spec.dtype.name == "bfloat16" and base_2


def has_ring(spec: AttentionSpec) -> bool:
    """Whether some of the bias comes with each block of keys."""
    return form_of(spec) in ("whole", "columns")


def writes_gradient(spec: AttentionSpec) -> bool:
    """Whether the kernel of dQ can write the gradient of the bias, which nothing shares."""
    whole = (spec.batch, spec.heads, spec.queries, spec.keys)
    return form_of(spec) == "whole" and spec.d_bias_shape == whole


def sums_gradient(spec: AttentionSpec) -> bool:
    """Whether Hopper's kernel of sums makes it: each of its tiles is of one tile of the bias."""
    if form_of(spec) != "whole" or writes_gradient(spec):
        return False
    return spec.d_bias_shape == spec.bias_shape and spec.rows("d_bias") == spec.rows("bias")


def lends_memory(spec: AttentionSpec) -> bool:
    """Whether a gradient that is summed afterwards has room for dQ in float32 until then."""
    if not sums_gradient(spec) or max(spec.head_dim, spec.value_dim) > 128:
        return False
    assert spec.bias_dtype is not None
    assert spec.d_bias_shape is not None
    width = -(-spec.head_dim // 64) * 64
    dq = 4 * spec.batch * spec.heads * -(-spec.queries // 128) * 128 * width
    return dq <= prod(spec.d_bias_shape) * spec.bias_dtype.itemsize


def d_bias_sharers(spec: AttentionSpec) -> tuple[int, int, int]:
    """Rows and heads of a bias's gradient, and how many of the batch's share each."""
    assert spec.d_bias_shape is not None
    rows, heads, _, _ = spec.d_bias_shape
    return rows, heads, spec.batch * spec.heads // (rows * heads)


def rows_share(spec: AttentionSpec) -> bool:
    """Whether rows of the batch read the same tiles of a bias."""
    return form_of(spec) == "whole" and spec.rows("bias").count < spec.batch


def padding(spec: AttentionSpec) -> tuple[int, int]:
    """Queries and keys that a whole bias lacks to be copied in tiles."""
    assert spec.bias_shape is not None
    _, _, t, s = spec.bias_shape
    return copyable(t, 8) - t, padded_width(s) - s


def copied_bytes(spec: AttentionSpec) -> int:
    """Bytes of the copy of a bias that ends within a tile; 0 if it is read in place."""
    if form_of(spec) != "whole" or padding(spec) == (0, 0):
        return 0
    assert spec.bias_shape is not None
    assert spec.bias_dtype is not None
    rows, heads, t, s = spec.bias_shape
    more_t, more_s = padding(spec)
    return prod((rows, heads, t + more_t, s + more_s)) * spec.bias_dtype.itemsize
