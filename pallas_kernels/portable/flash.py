"""Flash attention for any NVIDIA GPU from Ampere on, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jax import Array

from pallas_kernels.portable import flash_forward
from pallas_kernels.portable.bias_gradient import bias_gradient, summed, way_of
from pallas_kernels.portable.flash_backward import key_gradients, query_gradients
from pallas_kernels.portable.inputs import backward_inputs
from pallas_kernels.portable.tiles import Tiles, bias_tiles, key_tiles, query_tiles

if TYPE_CHECKING:
    from jattn.call.row_arrays import BackwardRows
    from jattn.call.spec import AttentionSpec, Operands

__all__ = ["BackwardTiles", "backward", "backward_tiles", "forward"]

forward = flash_forward.forward


class BackwardTiles(NamedTuple):
    """Those of the kernel of keys' gradients, of queries', and of a shared bias's."""

    keys: Tiles
    queries: Tiles
    bias: Tiles


def backward_tiles(spec: AttentionSpec) -> BackwardTiles:
    """The tables' tiles."""
    return BackwardTiles(key_tiles(spec), query_tiles(spec), bias_tiles(spec))


def backward(
    spec: AttentionSpec,
    operands: Operands,
    rows: BackwardRows,
    *,
    wants_bias: bool = True,
    wants_scale: bool = False,
    tiles: BackwardTiles | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """Gradients of query, key and value in the call's dtype; and of the bias, in its own.

    Args:
      spec: the call; `refusals` must be empty for it.
      operands: its arrays.
      rows: what else each row has, of the output the row term.
      wants_bias: False leaves out the bias's gradient; without a bias there is none.
      wants_scale: the gradient of query is to be dS K in float32, not multiplied by the scale.
      tiles: tile shapes to use instead of the tables'.
      interpret: run on a CPU.
    """
    tiles = tiles or backward_tiles(spec)
    inputs = backward_inputs(spec, operands, rows)
    way = way_of(spec) if wants_bias else None
    dk, dv, *sums = key_gradients(
        spec, operands, inputs, tiles.keys, sums_bias=way == "columns", interpret=interpret
    )
    dq, *by_query = query_gradients(
        spec, operands, inputs, tiles.queries,
        bias=way if way in ("whole", "rows") else None, unscaled=wants_scale,
        interpret=interpret,
    )  # fmt: skip
    if way is None:
        return dq, dk, dv
    if way == "shared":
        return dq, dk, dv, bias_gradient(spec, inputs, tiles.bias, interpret=interpret)
    if way == "whole":
        return dq, dk, dv, by_query[0]
    (partial,) = by_query + sums
    return dq, dk, dv, summed(spec, partial[..., None] if way == "rows" else partial[:, :, None])
