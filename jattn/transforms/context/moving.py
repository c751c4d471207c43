"""What moves in one device's part of a longer call, and the kernels that take it, by name.

Both maps, the tangent of the output and the tangents of the gradients, are sums over keys of rows'
results, and over queries of keys' results:

    of rows     t_out, t_lse; query, scale      (B, T, N, ...), each with all keys that it sees
    of keys     key, value                      (B, S, K, ...), each with all queries that see it
    bias        where it lies
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jattn.call.row_arrays import BackwardTangentRows, TangentRows
from jattn.call.spec import AttentionSpec, Operands, Tangents
from jattn.transforms.context.kernels import Gradients, added_bias
from jattn.transforms.context.parts import (
    Keys,
    Part,
    context_of,
    device_index,
    kept_heads,
    queries_of,
)

__all__ = ["OF_KEYS", "OF_ROWS", "Given", "Moving", "own_keys"]

OF_ROWS = ("t_out", "t_lse", "query", "scale")
OF_KEYS = ("key", "value")
_ROUNDED = ("t_out", "query", "key", "value")  # to the call's dtype, in the end

type Found = dict[str, Array]


class Given(NamedTuple):
    """A device's arrays: its operands; by name what else each of its rows has; its tangents."""

    operands: Operands
    rows: Mapping[str, Array]
    tangents: Tangents

    @staticmethod
    def of(
        operands: Operands, rows: TangentRows | BackwardTangentRows, tangents: Tangents
    ) -> Given:
        """Those of a device's call."""
        held: dict[str, Any] = rows._asdict()
        return Given(operands, {n: x for n, x in held.items() if x is not None}, tangents)

    def of_heads(
        self, spec: AttentionSpec, number: int, pieces: int
    ) -> tuple[AttentionSpec, Given]:
        """The call of one of so many pieces of the heads."""
        if pieces == 1:
            return spec, self
        count = spec.kv_heads // pieces
        part, own = kept_heads(spec, self.operands, number * count, count)
        of_keys = slice(number * count, (number + 1) * count)
        heads = slice(number * count * spec.group, (number + 1) * count * spec.group)
        own = own._replace(key=own.key[:, :, of_keys], value=own.value[:, :, of_keys])
        t = self.tangents
        moving = Tangents(
            query=None if t.query is None else t.query[:, :, heads],
            key=None if t.key is None else t.key[:, :, of_keys],
            value=None if t.value is None else t.value[:, :, of_keys],
            bias=t.bias if t.bias is None or t.bias.shape[1] == 1 else t.bias[:, heads],
            scale=t.scale,
        )
        return part, Given(own, {name: x[:, :, heads] for name, x in self.rows.items()}, moving)

    def at(self, part: Part, spec: AttentionSpec, keys: Keys, t_keys: Keys) -> Given:
        """Those of a part. keys: as in `Part.operands`; t_keys: the tangents of the same."""
        own = part.operands(spec, self.operands, keys)
        found: dict[str, Any] = {name: queries_of(part.keys, x) for name, x in t_keys.items()}
        if self.tangents.query is not None:
            found["query"] = queries_of(part.queries, self.tangents.query)
        if self.tangents.bias is not None:
            first, whole = part.keys.start(device_index(spec)), context_of(spec)
            rows = queries_of(part.queries, self.tangents.bias, axis=2)
            found["bias"] = part.columns(rows, first, whole)
        moving = Tangents(**found, scale=self.tangents.scale)
        of_rows = {name: queries_of(part.queries, x) for name, x in self.rows.items()}
        return Given(own, of_rows, moving)


def own_keys(given: Given) -> tuple[Keys, Keys]:
    """A device's keys, values and segment ids by name, and the tangents of the first two."""
    names = ("key", "value", "key_segments")
    own = {name: x for name in names if (x := getattr(given.operands, name)) is not None}
    t = {"key": given.tangents.key, "value": given.tangents.value}
    return own, {name: x for name, x in t.items() if x is not None}


@dataclass(frozen=True)
class Moving:
    """The kernels of one of the two maps, as the schedules call them.

    run: of a call's spec and arrays the results, in the order of their names.
    """

    run: Callable[[AttentionSpec, Given], tuple[Array, ...]]
    results: tuple[str, ...]

    def of(self, part: Part, spec: AttentionSpec, given: Given) -> Found:
        """The results of a part, by name."""
        return self.of_call(part.spec(spec), spec, given)

    def of_call(self, own: AttentionSpec, spec: AttentionSpec, given: Given) -> Found:
        """Of a call that is made of a device's; a sink is in its rows' sums if it was in those."""
        found = self.run(replace(own, has_sinks=spec.has_sinks), given)
        return dict(zip(self.results, found, strict=True))

    def named(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The results that are among these."""
        return tuple(name for name in names if name in self.results)

    def bias(self, spec: AttentionSpec, operands: Operands) -> Found:
        """The bias's before anything is added to it, by name; empty where it is not wanted."""
        sums = Gradients.zeros(spec, operands, wants_bias="bias" in self.results).bias
        return {} if sums is None else {"bias": sums}

    def with_bias(self, spec: AttentionSpec, sums: Found, part: Part, found: Found) -> Found:
        """The same with a part's added where it lies."""
        if "bias" not in sums:
            return {}
        return {"bias": added_bias(spec, sums["bias"], part, found["bias"])}

    def finished(self, spec: AttentionSpec, found: Found) -> tuple[Array, ...]:
        """The results as the map gives them, in order."""

        def whole(name: str, x: Array) -> Array:
            if name == "bias":
                assert spec.d_bias_shape is not None
                return x[..., : spec.d_bias_shape[3]].astype(spec.bias_dtype)
            return x.astype(spec.dtype) if name in _ROUNDED else x

        return tuple(whole(name, found[name]) for name in self.results)

    def sums_of_rows(self, given: Given, dtype: Any) -> Found:
        """The rows' gradients' tangents before anything is added to them."""
        like = {"query": given.operands.query, "scale": given.rows["top"]}
        shapes = {name: like[name].shape for name in self.named(OF_ROWS)}
        return {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
