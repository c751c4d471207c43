"""Tangents by heads: every device computes all queries and keys of some heads, as in `heads`."""

from __future__ import annotations

from jax import Array

from jattn.call.spec import AttentionSpec, Tangents
from jattn.transforms.context.heads import Work
from jattn.transforms.context.moving import OF_KEYS, OF_ROWS, Given, Moving
from jattn.transforms.context.plan import Plan

__all__ = ["moved"]


def moved(kernel: Moving, plan: Plan, spec: AttentionSpec, given: Given) -> dict[str, Array]:
    """The results of a device's rows and keys, by name; that of a bias is of its own heads."""
    work = Work.of(plan, spec, given.operands)
    t = given.tangents
    rows = {"query": given.operands.query, **given.rows}
    rows |= {} if t.query is None else {"t_query": t.query}
    keys = {"key": given.operands.key, "value": given.operands.value}
    keys |= {f"t_{name}": x for name in OF_KEYS if (x := getattr(t, name)) is not None}
    bias = kernel.bias(spec, given.operands)
    of_rows, of_keys = kernel.named(OF_ROWS), kernel.named(OF_KEYS)

    def compute(
        piece: int, held_rows: list[Array], held_keys: list[Array]
    ) -> tuple[list[Array], list[Array]]:
        nonlocal bias
        its_rows = dict(zip(rows, held_rows, strict=True))
        its_keys = dict(zip(keys, held_keys, strict=True))
        query = its_rows.pop("query")
        own, operands = work.call(piece, query, its_keys["key"], its_keys["value"])
        moving = Tangents(
            query=its_rows.pop("t_query", None),
            key=its_keys.get("t_key"),
            value=its_keys.get("t_value"),
            bias=None if t.bias is None else work.of_heads(t.bias, piece, query.shape[2]),
            scale=t.scale,
        )
        found = kernel.of_call(own, spec, Given(operands, its_rows, moving))
        if bias:
            bias = {"bias": work.with_bias(bias["bias"], piece, found["bias"])}
        return [found[name] for name in of_rows], [found[name] for name in of_keys]

    whole = work.done(list(rows.values()), list(keys.values()), compute)
    found: dict[str, Array] = {}
    for names, arrays in zip((of_rows, of_keys), whole, strict=True):
        found |= dict(zip(names, arrays, strict=True))
    return found | bias
