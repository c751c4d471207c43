"""Compiles the portable kernels of tangents for absent GPUs, as compile_calls.py does the others.

compile_tangents.py DEVICE WHICH
"""

from __future__ import annotations

import pathlib
import sys
from functools import partial
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.portable.absent import gpus  # isort: skip

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jattn.call.arguments import attention_call
from jattn.call.row_arrays import BackwardTangentRows, TangentRows
from jattn.call.spec import AttentionSpec, Operands, Tangents
from pallas_kernels.portable.backward_tangent import backward_tangent
from pallas_kernels.portable.limits import tangent_refusals
from pallas_kernels.portable.tangent import tangent
from tests.cases import Case
from tests.portable.compile_calls import FEATURES, REFUSED, WIDTHS, Long, precision_of, report
from tests.shapes import arguments

CASES = {
    "widths": [Long("causal_32", head_dim=32, causal=True), *WIDTHS],
    "features": [case for case in FEATURES if case.name != "one_query"],
}
# Shared memory is too small for the least of tiles.
FLOAT32 = ("float32_256", "float32_512", "tf32_256", "tf32_512")
TANGENTS_REFUSED = {
    "h200": FLOAT32,
    "b200": FLOAT32,
    "a100": FLOAT32,
    "l4": (*FLOAT32, "causal_512", "float32_128"),
}
DIRECTIONS = ("tangent", "backward_tangent")


def shapes_of(case: Case, place: NamedSharding) -> dict[str, Any]:
    """What the kernels take beside the call's arguments."""

    def of(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    rows = (case.batch, case.queries, case.heads)
    out = of(*rows, case.value_dim or case.head_dim, dtype=jnp.dtype(case.dtype))
    return {"out": out, "d_out": out, "td_out": out, "row": of(*rows)}


def computed(
    case: Case, direction: str, floats: Any, rest: Any, tangents: Any, saved: dict[str, Any]
) -> tuple[jax.Array, ...]:
    """All that a direction may give, of a call whose every operand moves."""
    _, _, static = arguments(case)
    made = attention_call(**floats, **rest, **static)
    spec: AttentionSpec = made.spec
    operands: Operands = made.operands._replace(sinks=None)
    if reasons := tangent_refusals(spec):
        raise ValueError(reasons)
    names = ("query", "key", "value", "bias")
    moving = Tangents(**{name: tangents[name] for name in names if name in tangents})
    row = saved["row"]
    if direction == "tangent":
        return tangent(spec, operands, TangentRows(row, row, saved["out"], None), moving)
    wanted = tuple(name for name in names if name in tangents)
    rows = BackwardTangentRows(row, row, saved["d_out"], row, row, row, saved["td_out"])
    return backward_tangent(spec, operands, rows, moving, wanted=wanted)


def compiled(case: Case, direction: str, place: NamedSharding) -> Any:
    """The executable of one direction of a call."""
    floats, rest = (
        {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in part.items()}
        for part in arguments(case)[:2]
    )
    shapes = (floats, rest, floats, shapes_of(case, place))
    with precision_of(case):
        return jax.jit(partial(computed, case, direction)).lower(*shapes).compile()


def main(device: str, which: str) -> None:
    """A line for each call."""
    with gpus(device, 1) as mesh:
        everywhere = NamedSharding(mesh, PartitionSpec())
        for case in CASES[which]:
            if case.name in REFUSED.get(device, ()) + TANGENTS_REFUSED.get(device, ()):
                continue
            for direction in DIRECTIONS:
                call = {"call": case.name, "direction": direction}
                report(
                    call | {"device": device, "algorithm": "flash"},
                    partial(compiled, case, direction, everywhere),
                )


if __name__ == "__main__":
    main(*sys.argv[1:])
