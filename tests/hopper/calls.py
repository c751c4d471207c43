"""The calls that the Hopper kernels are tried on, beside the table of all backends' cases."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax

from jattn.call.arguments import attention_call
from jattn.call.spec import AttentionSpec
from tests.cases import FLOAT32, Case
from tests.shapes import arguments

HEAD_DIMS = (8, 40, 64, 72, 80, 96, 128, 192, 256)

Half = partial(Case, dtype="bfloat16")
Bottom = partial(Half, causal=True, alignment="bottom_right")

# Small enough for the interpreter: every feature, sizes that fit no tile.
SMALL = [
    Half("causal", 1, 200, 200, 2, 1, 64, causal=True),
    Bottom("bottom_right_wider_values", 1, 70, 333, 1, 1, 64, 96),
    Half("lengths", 2, 150, 300, 1, 1, 64, query_lengths=(150, 70), key_lengths=(0, 290)),
    Half("offsets", 2, 70, 270, 2, 1, 64, causal=True, window=(150, None), offset=(-30, 160)),
    Half("window", 1, 330, 330, 1, 1, 40, window=(260, 20)),
    Half("packed", 1, 200, 200, 1, 1, 64, segments="sorted", causal=True),
    Half("sinks_soft_cap", 1, 130, 130, 2, 2, 64, sinks=True, soft_cap=5.0),
    Half("one_query_split_keys", 2, 1, 300, 4, 1, 64, sinks=True, key_lengths=(3, 290)),
    Case("negative_scale_float16", 1, 40, 100, 4, 2, 72, dtype="float16", scale=-0.2),
    Half("one", 1, 1, 1, 1, 1, 8),
    Half("dq_in_fragments", 1, 70, 150, 2, 1, 128, causal=True),
    Half("latent_window", 1, 70, 150, 2, 1, 192, 128, sinks=True, window=(60, 30)),
    Half("wide_key_alone", 2, 5, 5, 4, 2, 176, 40, causal=True),
]  # fmt: skip

_LENGTHS = {"query_lengths": (700, 100, 0), "key_lengths": (899, 17, 333)}
_LEFT = {"window": (150, None)}
_TWO = {"query_lengths": (700, 100), "key_lengths": (899, 333)}

LARGE = [
    *(Half(f"causal_{h}", 2, 520, 520, 4, 2, h, causal=True) for h in HEAD_DIMS),
    *(Half(f"odd_{h}", 1, 1000, 1001, 2, 2, h) for h in HEAD_DIMS),
    *(Half(f"many_tiles_{h}", 4, 1030, 1030, 8, 8, h, causal=True) for h in (64, 128, 256)),
    *(Half(f"many_full_tiles_{h}", 4, 1024, 1024, 8, 8, h) for h in (64, 128, 256)),
    # So many tiles that they come from a counter.
    *(Half(f"counted_{h}", 4, 1030, 1030, 12, 4, h, causal=True) for h in (64, 128)),
    *(Half(f"counted_full_{h}", 4, 1000, 1000, 16, 16, h) for h in (64, 96, 128)),
    *(Half(f"few_tiles_{t}", 1, t, t, 16, 8, 64, causal=True) for t in (768, 1001)),
    Half("few_tiles_128", 1, 512, 512, 32, 8, 128, causal=True),
    Half("few_full_tiles", 1, 700, 770, 16, 16, 64),
    Half("counted_window_64", 1, 4100, 4100, 16, 4, 64, window=(300, 0)),
    Half("counted_packed_64", 1, 4100, 4100, 16, 4, 64, segments="sorted", causal=True),
    Half("counted_window", 1, 4100, 4100, 16, 4, 128, window=(200, 0), sinks=True),
    Half("counted_latent", 4, 1030, 1030, 12, 12, 192, 128, causal=True),
    Half("counted_latent_full", 4, 1024, 1024, 14, 14, 192, 128, sinks=True, soft_cap=9.0),
    replace(Bottom("", 1, 1024, 2048, 4, 4, 128), name="float16", dtype="float16"),
    Bottom("latent", 1, 333, 777, 4, 4, 192, 128),
    Half("lengths_64", 3, 700, 900, 4, 2, 64, **_LENGTHS),
    Half("lengths_128", 3, 700, 900, 4, 2, 128, causal=True, **_LENGTHS),
    Half("lengths_256", 3, 700, 900, 4, 2, 256, **_LENGTHS),
    Half("offsets_64", 3, 700, 900, 4, 2, 64, causal=True, offset=(-300, 100, 5000)),
    Half("offsets_128", 3, 700, 900, 4, 2, 128, causal=True, offset=(0, 64, 222), **_LEFT),
    Half("offsets_256", 2, 700, 900, 4, 2, 256, window=(90, 200), offset=(-100, 300), **_TWO),
    Half("offsets_packed", 2, 600, 800, 2, 2, 128, segments="sorted", causal=True, offset=(0, 200)),
    Half("one_query_offsets", 3, 1, 8192, 32, 8, 128, causal=True, offset=(0, 99, 8191)),
    Half("few_queries_offsets", 2, 5, 3000, 8, 2, 128, causal=True, offset=(2995, 100)),
    Half("left_window", 1, 2000, 2000, 2, 2, 128, window=(200, 0)),
    Half("window_both_sides", 1, 2000, 2000, 2, 2, 64, window=(200, 70)),
    Half("right_window", 1, 500, 2000, 2, 2, 256, window=(0, 300), alignment="bottom_right"),
    Half("packed_documents", 2, 1500, 1500, 2, 2, 128, segments="sorted"),
    Half("packed_causal", 2, 1500, 1500, 2, 2, 64, segments="sorted", causal=True),
    Half("mixed_segments", 2, 600, 600, 2, 2, 128, segments="unsorted"),
    Half("gemma", 2, 600, 600, 8, 2, 128, sinks=True, soft_cap=5.0, causal=True),
    Half("few_queries", 2, 5, 3000, 8, 2, 128, sinks=True),
    Half("one_query", 4, 1, 2048, 32, 8, 128),
    Half("one_query_long", 1, 1, 8192, 32, 8, 128, key_lengths=(7001,)),
    Half("three_heads_a_group", 2, 3, 5000, 12, 4, 64),
    Bottom("one_key_head_256", 2, 20, 500, 16, 1, 256),
    Bottom("packed_heads", 1, 60, 700, 8, 2, 128),
]  # fmt: skip


def has_kernel(case: Case) -> bool:
    """Whether the kernels do the call, in a dtype of 16 bits."""
    dims = case.head_dim, case.value_dim or case.head_dim
    fits = all(dim % 8 == 0 and dim <= 256 for dim in dims)
    narrow = case.bias is not None and (min(dims) < 64 or case.dropout)
    return fits and not (case.mask or narrow)


# The cases of all backends, one in bfloat16, the next in float16.
SHARED = [
    replace(case, name=f"{case.name}-{dtype}", dtype=dtype)
    for i, case in enumerate(filter(has_kernel, FLOAT32))
    for dtype in [("bfloat16", "float16")[i % 2]]
]


def spec_of(case: Case) -> AttentionSpec:
    """The static facts of the call."""
    floats, rest, static = arguments(case)
    found = []
    jax.eval_shape(lambda x: found.append(attention_call(**x, **static).spec), floats | rest)
    return found[0]
