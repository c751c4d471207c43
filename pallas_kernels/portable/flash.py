"""Flash attention for any NVIDIA GPU from Ampere on, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jax import Array

from pallas_kernels.portable import flash_forward
from pallas_kernels.portable.bias_gradient import bias_gradient, summed, way_of
from pallas_kernels.portable.flash_backward import key_gradients, query_gradients
from pallas_kernels.portable.inputs import backward_inputs
from pallas_kernels.portable.tiles import BackwardTiles, bias_tiles, key_tiles, query_tiles

if TYPE_CHECKING:
    from jattn.call.row_arrays import AnyBackwardRows
    from jattn.call.spec import AttentionSpec, Operands

__all__ = ["backward", "backward_tiles", "forward", "whole_bias_gradient"]

forward = flash_forward.forward


def backward_tiles(spec: AttentionSpec) -> BackwardTiles:
    """The tables' tiles."""
    return BackwardTiles(key_tiles(spec), query_tiles(spec), bias_tiles(spec))


def backward(
    spec: AttentionSpec,
    operands: Operands,
    rows: AnyBackwardRows,
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
    by_keys = key_gradients(
        spec, operands, inputs, tiles.keys, sums_bias=way == "columns", interpret=interpret
    )
    by_queries = query_gradients(
        spec, operands, inputs, tiles.queries,
        bias=way if way in ("whole", "rows") else None, unscaled=wants_scale,
        interpret=interpret,
    )  # fmt: skip
    found = by_queries["dq"], by_keys["dk"], by_keys["dv"]
    if way is None:
        return found
    if way == "shared":
        return *found, bias_gradient(spec, inputs, tiles.bias, interpret=interpret)
    if way == "whole":
        return *found, by_queries["d_bias"]
    if way == "rows":
        return *found, summed(spec, by_queries["row_sums"][..., None])
    return *found, summed(spec, by_keys["column_sums"][:, :, None])


def whole_bias_gradient(
    spec: AttentionSpec, operands: Operands, rows: AnyBackwardRows, *, interpret: bool
) -> Array:
    """The bias's alone, of one with queries and keys of its own; the arguments are `backward`'s."""
    inputs = backward_inputs(spec, operands, rows)
    return bias_gradient(spec, inputs, bias_tiles(spec), interpret=interpret)
