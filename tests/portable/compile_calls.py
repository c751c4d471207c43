"""Compiles the portable kernels for absent GPUs and prints what the assembler says, as JSON lines.

    compile_calls.py DEVICE WHICH

DEVICE is h200, a100, b200 or l4, WHICH widths or features. A program of its own: see
tests/hopper/compile_tiles.py.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.portable.absent import gpus, standard_error  # isort: skip

import jax
from jax.sharding import NamedSharding, PartitionSpec

import jattn
from jattn.backends.kernels import only
from tests.cases import Case
from tests.hopper.compile_tiles import of_direction
from tests.shapes import arguments

ALGORITHMS = {"flash": jattn.flash_attention, "chunked": jattn.memory_efficient_attention}

Long = partial(
    Case, batch=1, queries=1024, keys=1024, heads=4, kv_heads=4, head_dim=128, dtype="bfloat16"
)
# A row of the tables of tiles each; 192 is wider in shared memory than it is.
WIDTHS = [
    *(Long(f"causal_{h}", head_dim=h, causal=True) for h in (64, 128, 192, 256, 512)),
    *(Long(f"float32_{h}", head_dim=h, dtype="float32") for h in (64, 128, 256, 512)),
    *(Long(f"tf32_{h}", head_dim=h, dtype="float32") for h in (64, 128, 256, 512)),
]
FEATURES = [
    Long("full_128"),
    Long("latent", head_dim=192, value_dim=128, causal=True),
    Long("ragged", queries=1001, keys=1023, head_dim=72, kv_heads=2),
    Long("bias", bias="1NTS", batch=2),
    Long("bias_of_many", bias="1NTS", batch=64, queries=256, keys=256, head_dim=32),
    Long("bias_keys", bias="B11S", head_dim=64),
    *(Long(f"bias_float32_{h}", bias="BNTS", bias_dtype="float32", head_dim=h) for h in (64, 128)),
    Long("dropout", dropout=0.1),
    Long("bias_mask_dropout", batch=2, bias="1NTS", mask="B1TS", dropout=0.1),
    Long("far_mask", queries=49_152, keys=49_152, heads=1, kv_heads=1, mask="11TS"),
    Long("mask_soft_cap_sinks", mask="B1TS", soft_cap=30.0, sinks=True),
    Long("packed", segments="sorted", causal=True, key_lengths=(9,), query_lengths=(9,)),
    Long("window", window=(200, 0)),
    Long("offsets", batch=2, window=(200, 0), bias="1NTS", offset=(9, 9)),
    Long("one_query", queries=1, keys=4096, heads=8, kv_heads=2),
]
REFUSED = {
    "a100": ("float32_512",),
    "l4": ("float32_256", "float32_512", "tf32_512"),
}
# Both algorithms have the same backward.
CALLS = {
    "widths": [
        *((case, direction, "flash") for case in WIDTHS for direction in ("forward", "backward")),
        *((case, "forward", "chunked") for case in WIDTHS if case.causal),
    ],
    "features": [
        (case, direction, "flash") for case in FEATURES for direction in ("forward", "backward")
    ],
}


def compiled(
    case: Case, direction: str, algorithm: str, place: Callable[[str, Any], NamedSharding]
) -> Any:
    """The executable of one direction of a call, arrays placed by name."""
    floats, rest, static = arguments(case)

    def attend(floats: Any, rest: Any) -> Any:
        with only("portable"):
            return ALGORITHMS[algorithm](**floats, **rest, **static, return_residual=True)

    def placed(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        name = path[-1].key if path and hasattr(path[-1], "key") else ""
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(name, x))

    with precision_of(case):
        function, shapes = of_direction(direction, attend, (floats, rest))
        return jax.jit(function).lower(*jax.tree_util.tree_map_with_path(placed, shapes)).compile()


def spills(said: str) -> int:
    """Bytes that the kernels of a call spill."""
    return sum(map(int, re.findall(r"frame, (\d+) bytes spill stores", said)))


def precision_of(case: Case) -> AbstractContextManager[None]:
    """That of float32 products, by the case's name."""
    return jax.default_matmul_precision("tensorfloat32" if "tf32" in case.name else None)


def report(call: dict[str, str], compile_it: Callable[[], Any]) -> None:
    """Prints a line: spilled bytes, and bytes held beside arguments and results; or the error."""
    found: dict[str, Any] = {"jax": jax.__version__} | call
    try:
        with standard_error() as said:
            made = compile_it()
    except Exception as error:  # the others are still to be seen
        found["error"] = f"{type(error).__name__}: {error}"[:400]
    else:
        sizes = made.memory_analysis()
        found |= {
            "spilled": spills(said()),
            "kernels": made.as_text().count("xla.gpu.triton"),
            "operands": sizes.argument_size_in_bytes + sizes.output_size_in_bytes,
            "temporary": sizes.temp_size_in_bytes,
        }
    print(json.dumps(found), flush=True)


def main(device: str, which: str) -> None:
    """A line for each call."""
    with gpus(device, 1) as mesh:
        everywhere = NamedSharding(mesh, PartitionSpec())
        for case, direction, algorithm in CALLS[which]:
            if case.name not in REFUSED.get(device, ()):
                call = {"call": case.name, "direction": direction}
                report(
                    call | {"device": device, "algorithm": algorithm},
                    partial(compiled, case, direction, algorithm, lambda name, x: everywhere),
                )


if __name__ == "__main__":
    main(*sys.argv[1:])
