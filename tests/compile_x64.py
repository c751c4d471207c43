"""Compiles every family of kernels for an absent H200 in 64-bit mode, and prints JSON lines.

In that mode Python's integers are 64 bits wide wherever nothing says otherwise, and so are the
lengths, offsets and ids that a user makes. A program of its own: see tests/hopper/compile_tiles.py.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tests.hopper.absent import standard_output  # isort: skip
from tests.portable.absent import gpus, standard_error  # isort: skip

import jax
from jax.sharding import NamedSharding, PartitionSpec

import jattn
from jattn.backends.kernels import only
from tests.cases import Case
from tests.hopper import compile_tiles as hopper
from tests.portable import compile_calls as portable
from tests.promotion import be_strict
from tests.shapes import arguments

KERNEL = {"hopper": "mosaic_gpu_v2", "flash": "xla.gpu.triton", "chunked": "xla.gpu.triton"}
# A case for each thing that an index is made of: the band, lengths, offsets, ids, heads.
ON_HOPPER = ("full_64", "lengths_128", "offsets_segments", "packed_heads", "array_scale_128")
PORTABLE = ("bias", "dropout", "mask_soft_cap_sinks", "packed", "offsets")


def calls() -> list[tuple[str, Case, str]]:
    """Algorithm, case and direction."""
    directions = ("forward", "backward")
    of_hopper = [case for case in hopper.CASES if case.name in ON_HOPPER]
    features = [case for case in portable.FEATURES if case.name in PORTABLE]
    return [
        *(("hopper", case, direction) for case in of_hopper for direction in directions),
        ("hopper", of_hopper[0], "deterministic"),
        *(("flash", case, direction) for case in features for direction in directions),
        *(("chunked", case, "forward") for case in features[-2:]),
    ]


def wide(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What a user in 64-bit mode has of it: integers, and the number that is the scale."""
    of = {"int32": "int64"} | ({"float32": "float64"} if x.shape == () else {})
    return jax.ShapeDtypeStruct(x.shape, of.get(x.dtype.name, x.dtype))


def call(algorithm: str, case: Case) -> tuple[Any, Any]:
    """A function of the floating operands and the rest, and the shapes of these."""
    if algorithm == "hopper":
        function, shapes = hopper.call(case)
    else:
        *shapes, static = arguments(case)

        def function(floats: Any, rest: Any) -> Any:
            return portable.ALGORITHMS[algorithm](**floats, **rest, **static, return_residual=True)

    def attend(floats: Any, rest: Any) -> Any:
        with only("hopper" if algorithm == "hopper" else "portable"):
            return function(floats, rest)

    return attend, tuple(shapes)


def compiled(algorithm: str, case: Case, direction: str, place: NamedSharding) -> dict[str, Any]:
    """How many kernels the call has, and what they spill."""
    attend, shapes = call(algorithm, case)
    with jattn.deterministic_gradients(direction == "deterministic"):
        function, shapes = hopper.of_direction(direction, attend, jax.tree.map(wide, shapes))
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
        )
        with standard_output() as out, standard_error() as err:
            made = jax.jit(function).lower(*placed).compile()
    said = out() if algorithm == "hopper" else err()
    return {"kernels": made.as_text().count(KERNEL[algorithm]), "spilled": portable.spills(said)}


def main() -> None:
    """One line for each call."""
    jax.config.update("jax_enable_x64", True)
    be_strict()
    with gpus("h200", 1) as mesh:
        place = NamedSharding(mesh, PartitionSpec())
        for algorithm, case, direction in calls():
            found = {"jax": jax.__version__, "call": case.name, "direction": direction}
            found |= {"device": "h200", "algorithm": algorithm}
            try:
                found |= compiled(algorithm, case, direction, place)
            except Exception as error:  # the others are still to be seen
                found["error"] = f"{type(error).__name__}: {error}"[:400]
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
