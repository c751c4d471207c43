"""Compiles the Hopper kernels for an absent H200 and prints what the assembler says, as JSON lines.

    compile_tiles.py PART PARTS

A program of its own, as it runs with jax's CUDA plugin and ptxas but none of CUDA's libraries.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.hopper.absent import h200s, standard_output  # isort: skip

import jax
from jax.sharding import NamedSharding, PartitionSpec

import jattn
from jattn.call.arguments import attention_call
from jattn.call.row_arrays import BackwardTangentRows
from jattn.call.spec import Tangents
from pallas_kernels.hopper.backward_tangent import query_gradient_tangent
from pallas_kernels.hopper.key_tangents import key_gradient_tangents
from tests.cases import Case
from tests.shapes import arguments

Long = partial(
    Case, batch=1, queries=2048, keys=2048, heads=16, kv_heads=16, head_dim=128, dtype="bfloat16"
)
Short = partial(Long, queries=512, keys=512, heads=8, kv_heads=8, causal=True)
HEAD_DIMS = (64, 80, 96, 128, 160, 192, 256)
WIDTHS = (64, 128, 256)  # one for each row of the table of tiles
# Whose gradients are one launch, which makes the row term where nobody asks for the log-sum-exp.
JOINED = [
    Short(f"joined_{name}", **options)
    for name, options in (
        ("causal_64", {"head_dim": 64}),
        ("grouped_64", {"head_dim": 64, "kv_heads": 2}),
        ("ragged_64", {"head_dim": 64, "queries": 333, "keys": 333}),
        ("causal_128", {}),
        ("full_64", {"head_dim": 64, "causal": False}),
        ("shared_128", {"queries": 1024, "keys": 1024, "heads": 32}),
        ("segments_64", {"head_dim": 64, "segments": "sorted"}),
        ("segments_full_128", {"causal": False, "segments": "sorted"}),
        ("offsets_64", {"head_dim": 64, "offset": (100,)}),
        ("float16_64", {"head_dim": 64, "dtype": "float16"}),
        ("dropout_64", {"head_dim": 64, "dropout": 0.1}),
        ("dropout_full_64", {"head_dim": 64, "dropout": 0.1, "causal": False}),
        ("dropout_128", {"dropout": 0.1}),
        ("cap_segments_64", {"head_dim": 64, "segments": "sorted", "soft_cap": 30.0}),
        ("alone_64", {"head_dim": 64, "queries": 256, "keys": 256}),
        ("alone_causal_128", {"queries": 256, "keys": 256}),
        ("alone_ragged_96", {"head_dim": 96, "queries": 250, "keys": 333}),
    )
]
FEW_QUERIES = [
    Long(f"one_query_one_key_head_{h}", queries=1, keys=4096, heads=32, kv_heads=1, head_dim=h)
    for h in WIDTHS
]

CASES = [
    *(Long(f"full_{h}", head_dim=h) for h in HEAD_DIMS),
    *(Long(f"causal_{h}", head_dim=h, causal=True) for h in HEAD_DIMS),
    Long("partly_whole", head_dim=176, causal=True),
    Long("eighths_136", head_dim=136, causal=True),
    Long("eighths_232", head_dim=232),
    Long("latent", head_dim=192, value_dim=128),
    Long("latent_causal", head_dim=192, value_dim=128, causal=True),
    # Few tiles: lower ones, of which some are two on a multiprocessor.
    *(
        Long(f"few_{t}_{h}", queries=t, keys=t, heads=n, kv_heads=n, head_dim=h, causal=True)
        for t, n, h in ((512, 32, 64), (768, 16, 64), (768, 16, 128))
    ),
    Long("few_full_64", queries=768, keys=768, head_dim=64),
    Long("short_causal_64", batch=8, queries=1024, keys=1024, head_dim=64, causal=True),
    *(
        Long(f"lists_{mask}", **({"batch": 16, "queries": 1024, "keys": 1024} | options))
        for mask, options in (
            ("full", {"queries": 640, "keys": 640}),
            ("causal", {"causal": True}),
            ("window", {"window": (255, 0)}),
        )
    ),
    Long("bottom_right", keys=4096, causal=True, alignment="bottom_right"),
    *(Long(f"window_{h}", head_dim=h, window=(1023, 0)) for h in WIDTHS),
    Long("wide_window_64", queries=8192, keys=8192, head_dim=64, window=(2047, 0)),
    *(
        Long(f"lengths_{h}", head_dim=h, causal=True, query_lengths=(9,), key_lengths=(9,))
        for h in WIDTHS
    ),
    *(
        Long(f"offsets_{h}", head_dim=h, causal=True, window=(1023, None), offset=(9,))
        for h in WIDTHS
    ),
    Long("offsets_segments", causal=True, segments="sorted", offset=(9,)),
    Long("one_query_offsets", queries=1, keys=4096, kv_heads=4, causal=True, offset=(9,)),
    *(Long(f"segments_{h}", head_dim=h, causal=True, segments="sorted") for h in WIDTHS),
    *(
        Long(f"soft_cap_sinks_{h}", head_dim=h, kv_heads=4, causal=True, soft_cap=50.0, sinks=True)
        for h in WIDTHS
    ),
    *(Long(f"array_scale_{h}", head_dim=h, causal=True) for h in WIDTHS),
    *(Long(f"array_scale_full_{h}", head_dim=h) for h in WIDTHS),
    Long("array_scale_vision", batch=8, queries=577, keys=577),
    *(Long(f"dropout_{h}", head_dim=h, dropout=0.1) for h in WIDTHS),
    *(Long(f"dropout_causal_{h}", head_dim=h, causal=True, dropout=0.1) for h in WIDTHS),
    *(
        Long(f"dropout_ragged_{h}", queries=1001, keys=2051, head_dim=h, causal=True, dropout=0.1)
        for h in (96, 128)
    ),
    Long("shared_ragged", queries=4097, keys=4097, heads=32, kv_heads=1, causal=True),
    Long("dropout_one_query", queries=1, keys=4096, kv_heads=4, dropout=0.1),
    *(Long(f"mask_{h}", head_dim=h, mask="11TS") for h in WIDTHS),
    Long("mask_keys", mask="B11S", causal=True),
    Long("mask_dropout_64", head_dim=64, mask="1NTS", dropout=0.1),
    Long("mask_ragged_64", head_dim=64, queries=1001, keys=2043, mask="11TS"),
    Long("narrow", head_dim=40, causal=True),
    Long("narrow_full", head_dim=32),
    Long("vision", batch=8, queries=577, keys=577, head_dim=64),
    Long("vision_72", batch=8, queries=729, keys=729, head_dim=72),
    *(
        Long(f"{name}_{h}", queries=2304, keys=2304, head_dim=h, **options)
        for h in (72, 104, 120)
        for name, options in (("pieces", {}), ("pieces_window", {"window": (1023, 0)}))
    ),
    Long("lengths_80", head_dim=80, causal=True, query_lengths=(9,), key_lengths=(9,)),
    Long("text_80", batch=8, queries=4096, keys=77, head_dim=80),
    Long("ragged", queries=1001, keys=2051),
    Long("ragged_256", queries=1001, keys=2051, head_dim=256, causal=True),
    Long("ragged_latent", queries=1001, keys=2051, head_dim=192, value_dim=128),
    Long("float16_causal_64", dtype="float16", head_dim=64, causal=True),
    *(Long(f"one_query_{h}", queries=1, keys=4096, kv_heads=4, head_dim=h) for h in WIDTHS),
    Long("one_query_long", queries=1, keys=32768, heads=32, kv_heads=8),
    *(Long(f"one_key_head_{h}", heads=32, kv_heads=1, head_dim=h, causal=True) for h in (128, 256)),
    *(
        Long(name, queries=t, keys=t, kv_heads=kv_heads, **({"heads": 32} | options))
        for name, t, kv_heads, options in (
            ("shared_64", 4096, 1, {"head_dim": 64, "causal": True}),
            ("shared_96", 4096, 1, {"head_dim": 96, "causal": True}),
            ("shared_128", 4096, 1, {"causal": True}),
            ("shared_long", 16384, 8, {"causal": True}),
            ("shared_by_seven", 4096, 4, {"causal": True, "heads": 28}),
            ("shared_window", 8192, 8, {"window": (4095, 0)}),
            ("grouped_window", 8192, 8, {"window": (1023, 0)}),
            ("window_alone", 8192, 32, {"window": (4095, 0)}),
        )
    ),
    *FEW_QUERIES,
    Long("grouped_long", batch=2, queries=8192, keys=8192, heads=32, kv_heads=8, causal=True),
    Long("short_documents", kv_heads=4, causal=True, segments="sorted"),
    *(
        Long(name, queries=t, keys=t, kv_heads=4, causal=True, segments="sorted", **options)
        for name, t, options in (
            ("documents", 32768, {}),
            ("documents_odd", 12345, {}),
            ("documents_64", 1001, {"batch": 16, "head_dim": 64}),
        )
    ),
    *(Long(f"grouped_{h}", heads=32, kv_heads=8, head_dim=h, causal=True) for h in (64, 80, 128)),
    *(
        Long(f"{name}_ragged", queries=1001, keys=2051, kv_heads=4, **options)
        for name, options in (
            ("causal", {"causal": True}),
            ("window", {"window": (1023, 0)}),
            ("lengths", {"query_lengths": (9,), "key_lengths": (9,)}),
            ("segments", {"segments": "sorted"}),
        )
    ),
    *(Long(f"text_{h}", batch=8, queries=4096, keys=77, head_dim=h) for h in (64, 128)),
    Long("text_64_96", batch=8, queries=4096, keys=80, head_dim=64, value_dim=96),
    Long("packed_heads", queries=60, keys=4096, kv_heads=4, causal=True, alignment="bottom_right"),
]
# Whose tiles come from a counter, of one batch row and of several.
COUNTED = [
    *(
        Long(
            f"counted_{mask}_{h}",
            batch=b,
            head_dim=h,
            **({"queries": 8192, "keys": 8192} | options),
        )
        for h in (64, 128)
        for b, mask, options in (
            (1, "full", {}),
            (2, "full_odd", {"queries": 5001, "keys": 5001}),
            (1, "causal", {"causal": True}),
            (2, "window", {"window": (255, 0), "kv_heads": 4}),
        )
    ),
    # Blocks of keys of all sizes but 128 and 64; outputs from registers.
    *(
        Long(f"by_{keys}_{h}", batch=b, queries=t, keys=t, head_dim=h)
        for keys, h, b, t in (
            (96, 64, 64, 257),
            (112, 128, 64, 197),
            (144, 112, 16, 1001),
            (176, 128, 1, 16384),
            (176, 88, 1, 12345),
            (112, 192, 4, 4096),
            (96, 176, 16, 1001),
            (96, 224, 4, 4096),
            (80, 240, 4, 4096),
            (80, 256, 16, 1001),
        )
    ),
    *(
        Long(f"from_registers_{h}", batch=4, queries=t, keys=t, head_dim=h, causal=True)
        for h, t in ((144, 4096), (160, 4097), (192, 4096), (208, 4096), (240, 4097), (256, 4096))
    ),
    Long("counted_latent", batch=4, head_dim=192, value_dim=128, causal=True),
    Long("counted_latent_full", batch=4, queries=1001, keys=1001, head_dim=192, value_dim=128),
]
# Few queries whose keys thread blocks share evenly.
EVEN_SHARES = [
    *(
        Long(f"even_shares_{h}", batch=12, queries=1, keys=32768, heads=32, kv_heads=8, head_dim=h)
        for h in (64, 128)
    ),
    Long(
        "even_shares_odd",
        batch=17,
        queries=4,
        keys=8201,
        heads=32,
        kv_heads=8,
        causal=True,
        alignment="bottom_right",
    ),
]
OF_TANGENTS = (
    *(
        f"{mask}_{h}"
        for mask in ("full", "causal", "segments", "soft_cap_sinks")
        for h in (64, 128)
    ),
    *("window_64", "lengths_128", "offsets_128", "bottom_right", "ragged", "one_query_128"),
)
BIASES = [
    *(
        Long(f"bias_{name}_{h}", head_dim=h, batch=2, bias=form, bias_dtype=dtype, **options)
        for h in WIDTHS
        for name, form, dtype, options in (
            ("full", "1NTS", "bfloat16", {}),
            ("float32", "1NTS", "float32", {"causal": True}),
            ("window", "11TS", "bfloat16", {"window": (1023, 0)}),
            ("columns", "1N1S", "float32", {}),
            ("columns_causal", "1N1S", "float32", {"causal": True}),
            ("rows", "BNT1", "float32", {}),
        )
    ),
    *(
        Long(f"bias_{name}", bias="BNTS", causal=True, **options)
        for name, options in (
            ("segments", {"segments": "sorted"}),
            ("lengths", {"query_lengths": (9,), "key_lengths": (9,)}),
            ("soft_cap_sinks", {"kv_heads": 4, "soft_cap": 50.0, "sinks": True}),
        )
    ),
    *(
        Long(f"bias_own_{dtype}_{h}", head_dim=h, bias="1NTS", bias_dtype=dtype, causal=True)
        for h in (64, 128)
        for dtype in ("bfloat16", "float32")
    ),
    *(
        Long(f"bias_shared_{name}_{h}", head_dim=h, batch=2, bias="1NTS", **options)
        for h in (64, 128)
        for name, options in (
            ("causal", {"causal": True}),
            ("segments", {"segments": "sorted"}),
            ("lengths", {"query_lengths": (9, 8), "key_lengths": (9, 8)}),
            ("soft_cap", {"kv_heads": 4, "soft_cap": 50.0}),
        )
    ),
    Long("bias_shared_causal_96", head_dim=96, batch=2, bias="1NTS", causal=True),
    # With what takes shared memory beside a bias that leaves little.
    *(
        Long(
            f"bias_shared_float32_{name}",
            batch=2,
            bias="1NTS",
            bias_dtype="float32",
            causal=True,
            **options,
        )
        for name, options in (
            ("packed_128", {"segments": "sorted"}),
            ("offsets_128", {"offset": (9, 9)}),
            ("window_96", {"window": (1023, 0), "head_dim": 96}),
        )
    ),
    *(
        Long(
            f"bias_short_{h}",
            batch=64,
            queries=512,
            keys=512,
            head_dim=h,
            bias="1NTS",
            bias_dtype=dtype,
            causal=True,
        )
        for h, dtype in ((64, "bfloat16"), (128, "float32"))
    ),
    # Of forward alone: tiles of four, three and two warpgroups.
    *(
        Long(
            f"bias_narrow_{name}",
            batch=64,
            queries=t,
            keys=t,
            head_dim=h,
            bias="1NTS",
            **options,
        )
        for name, t, h, options in (
            ("256", 256, 32, {}),
            ("256_float32", 256, 32, {"bias_dtype": "float32"}),
            ("256_causal", 256, 32, {"causal": True}),
            ("384", 384, 32, {}),
            ("384_segments", 384, 32, {"segments": "sorted", "bias_dtype": "float32"}),
            ("128_lengths", 128, 32, {"key_lengths": (9,) * 64}),
            ("256_float32_segments", 256, 32, {"segments": "sorted", "bias_dtype": "float32"}),
            ("512_float32_64", 512, 64, {"bias_dtype": "float32"}),
            ("ragged", 250, 24, {"soft_cap": 50.0, "sinks": True}),
        )
    ),
    Long("bias_shared_by_many", batch=64, queries=256, keys=256, head_dim=64, bias="1NTS"),
    Long("bias_one_query", queries=1, keys=4096, kv_heads=4, bias="1N1S"),
]
OF_BIASES = (
    "bias_own",
    "bias_shared",
    "bias_short",
    "bias_full",
    "bias_float32",
    "bias_window",
)  # gradients
# What is compiled of each case, but gradients that the portable kernels make, and of one query with
# many heads, which are shared out as others are. "backward" is the gradient without the forward it
# starts from, "still" that without the bias's, "deterministic" the same where that is computed in
# another way, "tangent" that of all operands, "query_tangent" and "key_tangents" the kernels of
# the gradients' tangents.
CALLS = [
    *(
        (case, direction)
        for direction in ("forward", "backward")
        for case in CASES
        if direction == "forward"
        or not (case in FEW_QUERIES or (case.mask and case.head_dim > 128))
    ),
    *(
        (case, "deterministic")
        for case in CASES
        for mask in ("full", "causal", "segments", "offsets")
        if case.name in (f"{mask}_64", f"{mask}_128")
    ),
    *(
        (case, "deterministic")
        for case in CASES
        if case.name in ("grouped_long", "shared_64", "shared_window")
    ),
    *((case, "tangent") for case in CASES if case.name in OF_TANGENTS),
    *(
        (case, "query_tangent")
        for case in CASES
        if case.name in OF_TANGENTS and case.soft_cap is None and case.name != "segments_128"
    ),
    *(
        (case, "key_tangents")
        for case in CASES
        if case.name in OF_TANGENTS and case.soft_cap is None and case.head_dim == 64
    ),
    *((case, "backward") for case in JOINED),
    *((case, "forward") for case in (*COUNTED, *EVEN_SHARES, *BIASES)),
    *(
        (case, "still")
        for case in BIASES
        if case.head_dim <= 128 and not case.name.startswith(("bias_shared", "bias_narrow"))
    ),
    *(
        (case, "backward")
        for case in BIASES
        if case.head_dim <= 128 and case.name.startswith(OF_BIASES)
    ),
]

# ptxas: "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to
# ... in function 'x'", "(C7513) ... in the function 'x'" and more of that kind.
NOTE = re.compile(r"\(C7\d+\)[^\n]*?(?= in (?:the )?function|\n|$)")
MOVES = re.compile(r"= (\w+)\[([\d,]*)\]\S* (pad|copy|transpose|concatenate)\(")


def main(part: int, parts: int) -> None:
    """One line for each call: its kernels' registers, spilled bytes, notes, and arrays moved."""
    with h200s(1) as mesh:
        place = NamedSharding(mesh, PartitionSpec())
        for case, direction in CALLS[part::parts]:
            found = {"jax": jax.__version__, "call": case.name, "direction": direction}
            try:
                found |= compiled(case, direction, place)
            except Exception as error:  # the others are still to be seen
                found["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(found), flush=True)


def compiled(case: Case, direction: str, place: NamedSharding) -> dict[str, Any]:
    """What there is to say of a call."""
    with jattn.deterministic_gradients(direction == "deterministic"):
        if direction in ("query_tangent", "key_tangents"):
            function, shapes = gradient_tangent(case, of_keys=direction == "key_tangents")
        else:
            function, shapes = of_direction(direction, *call(case))
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
        )
        with standard_output() as said:
            made = jax.jit(function).lower(*placed).compile()
    return read(said()) | {"moves": moves(case, direction, made)} | memory(made)


def call(case: Case) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    """A function of the floating operands and the rest, and the shapes of these."""
    floats, rest, options = arguments(case)
    if case.name.startswith("array_scale"):
        del options["scale"]
        floats["scale"] = jax.ShapeDtypeStruct((), "float32")

    def attend(floats: Any, rest: Any) -> Any:
        given = floats | {name: x for name, x in rest.items() if x is not None}
        alone = case.name.startswith("joined_alone")
        return jattn.flash_attention(**given, **options, return_residual=not alone)

    return attend, (floats, rest)


def of_direction(
    direction: str, function: Callable[..., Any], shapes: tuple[Any, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if direction == "forward":
        return function, shapes
    if direction == "still":
        floats, rest = shapes

        def beside(floats: Any, rest: Any) -> Any:
            return function(floats | {"bias": rest["bias"]}, rest | {"bias": None})

        moved = {name: x for name, x in floats.items() if name != "bias"}
        return of_direction("backward", beside, (moved, rest | {"bias": floats["bias"]}))
    if direction == "tangent":
        floats, rest = shapes

        def moved(floats: Any, rest: Any, tangents: Any) -> Any:
            return jax.jvp(lambda floats: function(floats, rest), (floats,), (tangents,))

        return moved, (floats, rest, floats)

    def saved(floats: Any, rest: Any) -> Any:
        return jax.vjp(lambda floats: function(floats, rest), floats)[1]

    residuals, cotangents = jax.eval_shape(saved, *shapes), jax.eval_shape(function, *shapes)
    return lambda vjp, cotangents: vjp(cotangents), (residuals, cotangents)


def gradient_tangent(case: Case, *, of_keys: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A kernel of gradients' tangents alone, and the shapes of its arguments."""
    floats, rest, options = arguments(case)

    def moved(floats: Any, rest: Any, tangents: Any, d_out: Any, row: Any) -> Any:
        made = attention_call(**floats, **rest, **options)
        rows = BackwardTangentRows(row, row, d_out, row, row, row, d_out)
        moving = Tangents(**{name: tangents[name] for name in ("query", "key", "value")})
        given = (made.spec, made.operands, rows, moving)
        return key_gradient_tangents(*given) if of_keys else query_gradient_tangent(*given)

    rows = (case.batch, case.queries, case.heads)
    d_out = jax.ShapeDtypeStruct((*rows, case.value_dim or case.head_dim), case.dtype)
    return moved, (floats, rest, floats, d_out, jax.ShapeDtypeStruct(rows, "float32"))


def read(said: str) -> dict[str, Any]:
    """The assembler's words on all kernels of a call."""
    return {
        "kernels": said.count("Compiling entry function"),
        "registers": max(map(int, re.findall(r"Used (\d+) registers", said)), default=0),
        "spilled": sum(map(int, re.findall(r"frame, (\d+) bytes spill stores", said))),
        "notes": sorted(set(NOTE.findall(said))),
    }


def moves(case: Case, direction: str, compiled: Any) -> list[str]:
    """Arrays of an operand's size that XLA pads, copies or transposes around the kernels.

    Only where it need not: in tangents, and in backward where a thread block has all keys,
    sequences that are no multiple of 8 are padded for the TMA unit.
    """
    ragged = case.queries % 8 or case.keys % 8
    in_place = direction in ("backward", "deterministic") and case.keys > 128
    if ragged and not in_place and direction != "forward":
        return []
    rows = min(case.queries * case.heads, case.keys * case.kv_heads)
    least = case.batch * rows * min(case.head_dim, case.value_dim or case.head_dim)
    found = MOVES.findall(compiled.as_text())
    return [
        f"{operation} {dtype}[{dims}]"
        for dtype, dims, operation in found
        if prod(map(int, filter(None, dims.split(",")))) >= least
    ]


def memory(compiled: Any) -> dict[str, int]:
    """Bytes of the call's arguments and results, and of what it holds beside them."""
    sizes = compiled.memory_analysis()
    return {
        "operands": sizes.argument_size_in_bytes + sizes.output_size_in_bytes,
        "temporary": sizes.temp_size_in_bytes,
    }


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
