"""Which tensor of a folder is which parameter of a `Decoder`: one table, read both ways.

A key and a path may hold one `*`, the number of a layer. A row is used where the decoder has the
parameter: biases, norms of heads and so on are in the table for the families that have them.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from numpy.typing import NDArray

__all__ = ["AS_STORED", "IGNORED", "TABLE", "TRANSPOSED", "Row", "Transform", "keys_of"]


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a parameter stands to the tensor it is stored as: with its axes in another order."""

    axes: tuple[int, ...] | None = None
    """For each axis of the parameter the stored one; None for the same. Its own inverse."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the other, or a slice of it for each axis."""
        return tuple(self.slices(shape))

    def slices[T](self, of_axes: tuple[T, ...]) -> tuple[T, ...]:
        """What is said of the one's axes, for those of the other."""
        if self.axes is None or len(of_axes) != len(self.axes):
            return of_axes
        return tuple(of_axes[axis] for axis in self.axes)

    def array(self, array: NDArray[Any]) -> NDArray[Any]:
        """The other's values."""
        return array if self.axes is None else array.transpose(self.axes)


AS_STORED = Transform()
TRANSPOSED = Transform((1, 0))


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a folder, or one of each layer."""

    key: str
    """Its name in the safetensors files."""

    path: str
    """The parameter's: attributes and numbers from the model on, with dots."""

    transform: Transform = AS_STORED


_LAYER_TENSORS = (
    "input_layernorm.weight",
    *(f"self_attn.{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias")),
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "post_attention_layernorm.weight",
    "pre_feedforward_layernorm.weight",
    *(f"mlp.{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")),
    "post_feedforward_layernorm.weight",
)

# The decoder keeps matrices as they are stored, (outputs, inputs).
TABLE: tuple[Row, ...] = (
    Row("model.embed_tokens.weight", "embed_tokens.weight"),
    *(Row(f"model.layers.*.{name}", f"layers.*.{name}") for name in _LAYER_TENSORS),
    Row("model.norm.weight", "norm.weight"),
    Row("lm_head.weight", "lm_head.weight"),
)

IGNORED = (
    "*.rotary_emb.inv_freq",  # a buffer that Transformers 4.31 and older stored; config.json has it
)
"""Tensors that old folders hold and no model needs; here `*` stands for anything."""


def keys_of(table: Iterable[Row], paths: Iterable[str]) -> dict[str, tuple[str, Transform]]:
    """For each parameter's path the key it is stored under, and how.

    Raises:
        KeyError: the table has no row for a path.
    """
    rows: Mapping[str, Row] = {row.path: row for row in table}
    found = {}
    for path in paths:
        layer = re.search(r"\.(\d+)\.", path)
        row = rows[path if layer is None else path.replace(layer[0], ".*.", 1)]
        found[path] = (row.key.replace("*", layer[1] if layer else "*", 1), row.transform)
    return found
