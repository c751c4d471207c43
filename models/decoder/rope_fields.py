"""The rotary positions that config.json asks for, in either of Hugging Face's dialects.

    {"rope_theta": 5e5, "rope_scaling": {"type" or "rope_type": "llama3", "factor": 8, ...}}
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8, ...}}

Where sliding layers have a base of their own (Gemma 3), the older dialect calls it
`rope_local_base_freq`, and the newer has an entry for each type of layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.decoder.fields import is_number
from models.decoder.rope import KINDS, Rope

__all__ = ["ROPE_FIELDS", "ropes_by_layer_type"]

type Fields = Mapping[str, Any]

ROPE_FIELDS = frozenset((
    "original_max_position_embeddings", "partial_rotary_factor", "rope_local_base_freq",
    "rope_parameters", "rope_scaling", "rope_theta",
))  # fmt: skip
"""The fields of config.json that say how positions turn heads."""

_FULL, _SLIDING = "full_attention", "sliding_attention"
# Keys of every kind; what names the kind, and what only says how the model came to be.
_COMMON = frozenset((
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    "finetuned",
))  # fmt: skip
_FLAGS = ("truncate",)
_NULLABLE = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def ropes_by_layer_type(
    fields: Fields, sizes: Fields, theta: float, local_theta: float | None
) -> dict[str, Rope]:
    """The rotary positions of full and of sliding layers.

    Args:
        fields: those of config.json that are `ROPE_FIELDS`.
        sizes: head_dim and max_position_embeddings.
        theta: the base where config.json has none.
        local_theta: that of sliding layers, in families that have one; None in those that do not.

    Raises:
        ValueError: a kind or a field that is not understood, or a value that is none; named.
    """
    if _given(fields, "partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor must be 1, got {fields['partial_rotary_factor']}")
    theta = _number("rope_theta", _given(fields, "rope_theta", theta))
    flat, nested = _parameters(fields)
    if local_theta is None:
        if nested or fields.get("rope_local_base_freq") is not None:
            name = "rope_parameters by layer type" if nested else "rope_local_base_freq"
            raise ValueError(f"{name} is only for models whose sliding layers have their own base")
        rope = _rope(flat, fields, sizes, theta)
        return {_FULL: rope, _SLIDING: rope}
    local_theta = _number(
        "rope_local_base_freq", _given(fields, "rope_local_base_freq", local_theta)
    )
    if fields.get("rope_parameters") and not nested:
        raise ValueError(
            f"rope_parameters must have the entries {_FULL} and {_SLIDING}, got"
            f" {', '.join(fields['rope_parameters'])}"
        )
    entries = {_FULL: nested.get(_FULL) or {}, _SLIDING: nested.get(_SLIDING) or {}}
    if fields.get("rope_scaling"):
        if "rope_type" not in flat and flat.get("type", "default") != "default":
            # Transformers 4 follows it, Transformers 5 takes the positions for unscaled.
            raise ValueError(
                f"rope_scaling of a model with rope_local_base_freq must say rope_type, not type:"
                f" {flat['type']!r}"
            )
        entries[_FULL] = {**entries[_FULL], **flat}
    for entry in entries.values():
        if entry.get("truncate") is False:
            raise ValueError("truncate in rope_parameters by layer type must be true, got False")
    return {
        _FULL: _rope(entries[_FULL], {}, sizes, theta),
        _SLIDING: _rope(entries[_SLIDING], {}, sizes, local_theta),
    }


def _parameters(fields: Fields) -> tuple[Fields, Fields]:
    """What holds for all layers, and what by type of layer."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields.get(name) or {}, Mapping):
            raise ValueError(f"{name} must be an object or null, got {fields[name]!r}")
    scaling = fields.get("rope_scaling") or {}
    parameters = fields.get("rope_parameters") or {}
    if parameters.keys() & {_FULL, _SLIDING}:
        for name, entry in parameters.items():
            if name not in (_FULL, _SLIDING):
                raise ValueError(f"rope_parameters has {name} beside its entries by layer type")
            if not isinstance(entry or {}, Mapping):
                raise ValueError(f"{name} of rope_parameters must be an object, got {entry!r}")
        return scaling, parameters
    return scaling or parameters, {}


def _rope(entry: Fields, top: Fields, sizes: Fields, theta: float) -> Rope:
    name = entry.get("rope_type", entry.get("type", "default"))
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"rope type {name!r} is none of {', '.join(KINDS)}")
    kind = KINDS[name]
    allowed = _COMMON | set(kind.required) | set(kind.optional)
    for field, value in entry.items():
        if field not in allowed and value is not None:
            raise ValueError(f"rope type {name!r} does not read {field} = {value!r}")
    for field in kind.required:
        if field not in entry:
            raise ValueError(f"rope type {name!r} needs {field}")
    if _given(entry, "partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor must be 1, got {entry['partial_rotary_factor']}")
    length = sizes["max_position_embeddings"]
    original = top.get("original_max_position_embeddings")
    if original is None:
        original = _given(entry, "original_max_position_embeddings", length)
    values = {
        "rope_theta": entry.get("rope_theta", theta),
        "original_max_position_embeddings": original,
        "max_position_embeddings": length,
        **kind.optional,
        **{field: entry[field] for field in entry if field in {*kind.required, *kind.optional}},
    }
    for field, value in values.items():
        if field in _FLAGS:
            if not isinstance(value, bool):
                raise ValueError(f"{field} of rotary positions must be true or false: {value!r}")
        elif value is not None or field not in (*_NULLABLE, *kind.nullable):
            _number(field, value)
    return kind.make(values, sizes["head_dim"])


def _number(name: str, value: Any) -> float:
    if not is_number(value) or value <= 0:
        raise ValueError(f"{name} of rotary positions must be a positive number, got {value!r}")
    return float(value)


def _given(fields: Fields, name: str, otherwise: Any) -> Any:
    value = fields.get(name)
    return otherwise if value is None else value
