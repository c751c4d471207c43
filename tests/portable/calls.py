"""The calls that the portable kernels are tried on, beside the table of all backends' cases."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tests.cases import (
    BIASES,
    CASES,
    EVERYTHING,
    FLOAT32,
    HALF,
    INTERVALS,
    LOGITS,
    SEGMENTS_AND_MASKS,
    SHAPES,
    Case,
)

HEAD_DIMS = (16, 40, 64, 72, 96, 128, 160, 192, 256, 320, 512)

Half = partial(Case, dtype="bfloat16")
Bottom = partial(Half, causal=True, alignment="bottom_right")

# Sizes that fit no block, several blocks of each kind, and what the table lacks.
SMALL = [
    Half("causal_blocks", 1, 200, 200, 2, 1, 64, causal=True),
    Bottom("bottom_right_wider_values", 1, 70, 333, 1, 1, 40, 96),
    Half("lengths", 2, 150, 300, 1, 1, 32, query_lengths=(150, 70), key_lengths=(0, 290)),
    Half("packed", 1, 300, 300, 1, 1, 16, segments="sorted", causal=True),
    Half("one_query_many_keys", 2, 1, 700, 8, 2, 64, sinks=True, key_lengths=(3, 650)),
    Half("one_query_offsets", 2, 1, 700, 8, 2, 64, sinks=True, causal=True, offset=(3, 650)),
    Case("wide_float32", 1, 70, 70, 1, 1, 320, bias="11TS", dropout=0.2),
    Half("widest", 1, 33, 40, 1, 1, 512, mask="11TS", causal=True),
]  # fmt: skip

# Of the table, the cases that the ordinary run interprets; a GPU runs all of it.
INTERPRETED = [
    *SHAPES[1::5],
    *INTERVALS[3::6],
    *SEGMENTS_AND_MASKS[1::4],
    *BIASES[::3],
    BIASES[-2],
    *LOGITS[5::2],
    *HALF[9::10],
]

_LENGTHS = {"query_lengths": (700, 100, 0), "key_lengths": (899, 17, 333)}

LARGE = [
    *(Half(f"causal_{h}", 2, 520, 520, 4, 2, h, causal=True) for h in HEAD_DIMS),
    *(Half(f"odd_{h}", 1, 1000, 1001, 2, 2, h) for h in HEAD_DIMS),
    *(Case(f"float32_{h}", 1, 333, 350, 2, 1, h, causal=True) for h in HEAD_DIMS),
    *(
        Half(f"bias_{form}", 2, 300, 333, 4, 2, 64, bias=form)
        for form in ("BNTS", "1NTS", "B1TS", "11TS", "BN1S", "1N1S", "B11S", "11T1", "BNT1", "1111")
    ),
    *(Half(f"mask_{form}", 2, 300, 333, 4, 2, 64, mask=form) for form in ("BNTS", "11TS", "B11S")),
    Half("bias_wide", 2, 300, 300, 2, 2, 256, bias="1NTS", bias_dtype="float32", causal=True),
    Half("dropout", 2, 500, 600, 4, 2, 128, dropout=0.1),
    Half("dropout_causal", 2, 500, 500, 4, 2, 64, dropout=0.4, causal=True, bias="1NTS"),
    Case("float16", 1, 512, 1024, 4, 4, 128, dtype="float16", causal=True),
    Half("latent", 1, 333, 777, 4, 4, 192, 128),
    Half("lengths_64", 3, 700, 900, 4, 2, 64, **_LENGTHS),
    Half("lengths_128", 3, 700, 900, 4, 2, 128, causal=True, **_LENGTHS),
    Half("offsets", 3, 700, 900, 4, 2, 64, causal=True, window=(300, None), offset=(-300, 0, 222)),
    Half("offsets_bias", 2, 300, 333, 4, 2, 64, window=(60, 5), bias="1NTS", offset=(-99, 200)),
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
    replace(EVERYTHING, name="everything_long", dtype="bfloat16", queries=600, keys=700,
            head_dim=64, window=(300, 30), query_lengths=(600, 500), key_lengths=(700, 399)),
]  # fmt: skip

# One call for each feature, in a dtype that every kernel takes.
AGREED = [
    Half("agreed_causal", 1, 70, 90, 2, 1, 64, causal=True, alignment="bottom_right"),
    Half("agreed_window_lengths", 2, 80, 80, 1, 1, 64, window=(30, 9), key_lengths=(80, 33)),
    Half("agreed_packed_sinks", 1, 80, 80, 2, 2, 64, segments="sorted", sinks=True, soft_cap=5.0),
    Half("agreed_bias", 2, 70, 80, 2, 1, 64, bias="1NTS", causal=True),
    Half("agreed_mask_dropout", 2, 70, 80, 2, 2, 64, mask="B1TS", dropout=0.3),
    replace(EVERYTHING, name="agreed_everything", dtype="float16", head_dim=16),
]  # fmt: skip

# The shared table as the Hopper kernels take it, and as it is.
ON_A_GPU = [
    *AGREED,
    *(replace(c, name=f"{c.name}-half", dtype=("bfloat16", "float16")[i % 2])
      for i, c in enumerate(FLOAT32)),
    *CASES,
]  # fmt: skip
