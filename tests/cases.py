"""The calls every backend must get right: one table, knowing nothing of backends."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference

DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")


@dataclass(frozen=True)
class Case:
    """One call. Forms such as "1N1S" name the axes of (B, N, T, S) that an operand really has."""

    name: str
    batch: int = 2
    queries: int = 24
    keys: int = 40
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int | None = None
    dtype: str = "float32"
    causal: bool = False
    alignment: str = "top_left"
    offset: int | tuple[int, ...] | None = None  # a tuple is an array, not known when traced
    window: int | tuple[int | None, int | None] | None = None
    query_lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    segments: str | None = None
    mask: str | None = None
    mask_density: float = 0.7
    bias: str | None = None
    bias_dtype: str | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    shared_dropout: bool = False
    scale: float | None = None
    batched: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def sizes(self) -> dict[str, int]:
        return {"B": self.batch, "N": self.heads, "T": self.queries, "S": self.keys, "1": 1}

    def shape_of(self, form: str) -> tuple[int, ...]:
        full = self.sizes
        return tuple(full[letter] for letter in form)


def packed_ids(rng: np.random.Generator, batch: int, length: int) -> Any:
    """Sorted ids, as a packer of short sequences writes them."""
    return np.sort(rng.integers(0, 4, (batch, length)), axis=1).astype(np.int32)


def loose_ids(rng: np.random.Generator, batch: int, length: int) -> Any:
    ids = np.array([-7, 0, 5, 2**31 - 1], np.int32)
    return ids[rng.integers(0, 4, (batch, length))]


@dataclass(frozen=True)
class Operands:
    """Arrays of one case, drawn from a seed, and the same call made of NumPy."""

    case: Case
    seed: int

    @cached_property
    def _draws(self) -> dict[str, Any]:
        case = self.case
        rng = np.random.default_rng([self.seed, zlib.crc32(case.name.encode())])
        dtype = jnp.dtype(case.dtype)

        def normal(*shape: int, to: Any = dtype) -> Any:
            return rng.standard_normal(shape).astype(to)

        b, t, s = case.batch, case.queries, case.keys
        value_dim = case.head_dim if case.value_dim is None else case.value_dim
        draws: dict[str, Any] = {
            "q": normal(b, t, case.heads, case.head_dim),
            "k": normal(b, s, case.kv_heads, case.head_dim),
            "v": normal(b, s, case.kv_heads, value_dim),
            "dout": normal(b, t, case.heads, value_dim),
            "dlse": normal(b, t, case.heads, to=np.float32),
        }
        if case.bias is not None:
            draws["bias"] = normal(*case.shape_of(case.bias), to=case.bias_dtype or dtype)
        if case.sinks:
            draws["sinks"] = normal(case.heads)
        if case.mask is not None:
            draws["mask"] = rng.random(case.shape_of(case.mask)) < case.mask_density
        if case.segments is not None:
            draw = {"sorted": packed_ids, "unsorted": loose_ids}[case.segments]
            draws["query_segments"] = draw(rng, b, t)
            draws["key_segments"] = draws["query_segments"] if t == s else draw(rng, b, s)
        return draws

    def __getitem__(self, name: str) -> Any:
        return self._draws[name]

    @property
    def differentiable(self) -> dict[str, Any]:
        return {name: self._draws[name] for name in DIFFERENTIABLE if name in self._draws}

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that are no functions of the differentiable operands."""
        case = self.case
        lengths = {
            # Of a traced array the values are not known, so that negative ones are no error.
            name: jnp.array(value, jnp.int32) + jnp.zeros((), jnp.int32)
            for name, value in (
                ("query_seq_lengths", case.query_lengths),
                ("key_value_seq_lengths", case.key_lengths),
            )
            if value is not None
        }
        segments = (
            {
                "query_segment_ids": jnp.asarray(self["query_segments"]),
                "key_value_segment_ids": jnp.asarray(self["key_segments"]),
            }
            if case.segments
            else {}
        )
        dropout = (
            {
                "dropout_rate": case.dropout,
                "dropout_rng": jax.random.key(7),
                "broadcast_dropout": case.shared_dropout,
            }
            if case.dropout
            else {}
        )
        return {
            "mask": jnp.asarray(self["mask"]) if case.mask else None,
            "scale": case.scale,
            "is_causal": case.causal,
            "local_window_size": case.window,
            "causal_alignment": case.alignment,
            "query_offset": (
                jnp.array(case.offset, jnp.int32) if isinstance(case.offset, tuple) else case.offset
            ),
            "logits_soft_cap": case.soft_cap,
            **lengths,
            **segments,
            **dropout,
        }

    @cached_property
    def seen(self) -> reference.Bools:
        case = self.case
        return reference.visible(
            case.batch,
            case.queries,
            case.keys,
            causal=case.causal,
            alignment=case.alignment,
            offset=case.offset,
            window=case.window,
            query_lengths=case.query_lengths,
            key_lengths=case.key_lengths,
            query_segments=self._draws.get("query_segments"),
            key_segments=self._draws.get("key_segments"),
            mask=self._draws.get("mask"),
        )

    def exact(self, keep: reference.Bools | None) -> reference.Attention:
        return reference.attention(
            self["q"],
            self["k"],
            self["v"],
            seen=self.seen,
            bias=self._draws.get("bias"),
            scale=self.case.scale,
            soft_cap=self.case.soft_cap,
            sinks=self._draws.get("sinks"),
            keep=keep,
            rate=self.case.dropout,
        )


@cache
def operands(case: Case, seed: int) -> Operands:
    return Operands(case, seed)


EVERYTHING = Case(
    "everything",
    queries=37,
    keys=45,
    causal=True,
    alignment="bottom_right",
    window=(20, 3),
    query_lengths=(37, 21),
    key_lengths=(45, 30),
    segments="sorted",
    mask="B1TS",
    mask_density=0.9,
    bias="1NTS",
    soft_cap=5.0,
    sinks=True,
    dropout=0.2,
    scale=0.4,
)

SHAPES = [
    Case("plain"),
    Case("square", queries=32, keys=32),
    Case("more_queries_than_keys", queries=40, keys=24),
    Case("odd_sizes", queries=37, keys=53, head_dim=7),
    Case("one_query", queries=1),
    Case("one_key", keys=1),
    Case("one_query_one_key", queries=1, keys=1),
    Case("many_blocks", queries=64, keys=64, causal=True),
    Case("one_head_each", heads=1, kv_heads=1),
    Case("multi_head", kv_heads=4),
    Case("multi_query", kv_heads=1),
    Case("groups_of_three", heads=6, kv_heads=2, bias="BNTS"),
    Case("value_dim_smaller", head_dim=12, value_dim=5),
    Case("value_dim_larger", head_dim=5, value_dim=12, causal=True),
    Case("dims_of_one", head_dim=1, value_dim=1),
    Case("one_sequence", batch=1),
    Case("no_batch_axis", batch=1, batched=False, causal=True),
    Case("scale", scale=0.07),
    Case("negative_scale", scale=-0.3),
]

INTERVALS = [
    Case("causal_square", queries=40, keys=40, causal=True),
    Case("causal_more_keys", queries=24, keys=40, causal=True),
    Case("causal_more_queries", queries=40, keys=24, causal=True),
    Case("bottom_right_more_keys", causal=True, alignment="bottom_right"),
    Case("bottom_right_more_queries", queries=40, keys=24, causal=True, alignment="bottom_right"),
    Case("bottom_right_one_query", queries=1, causal=True, alignment="bottom_right"),
    Case("window_pair", queries=48, keys=48, window=(5, 3)),
    Case("window_int", queries=48, keys=48, window=4),
    Case("window_of_itself", queries=40, keys=40, window=(0, 0)),
    Case("window_causal", queries=56, keys=56, window=(9, 9), causal=True),
    Case("window_left_only", queries=40, keys=40, window=(6, 0)),
    Case("window_wider_than_all", window=(1000, 1000)),
    Case("window_more_queries", queries=64, keys=24, window=(2, 2)),
    Case("window_bottom_right", queries=24, keys=64, window=(4, 2), alignment="bottom_right"),
    Case(
        "window_bottom_right_more_queries",
        queries=64,
        keys=24,
        window=(4, 2),
        alignment="bottom_right",
    ),
    Case(
        "window_causal_bottom_right",
        queries=24,
        keys=56,
        window=(7, 0),
        causal=True,
        alignment="bottom_right",
    ),
    Case("offset_negative_causal", causal=True, offset=-9),
    Case("offsets_each_way", causal=True, offset=(-30, 21), window=(11, None)),
    Case("offsets_window", queries=40, keys=56, window=(3, 5), offset=(-7, 22)),
    Case("offsets_lengths", causal=True, offset=(11, 16), key_lengths=(20, 40)),
    Case("key_lengths", key_lengths=(17, 40)),
    Case("key_lengths_none_and_one", key_lengths=(0, 1)),
    Case("query_lengths", query_lengths=(9, 24)),
    Case("query_lengths_none_and_all", query_lengths=(0, 24)),
    Case("both_lengths", query_lengths=(24, 5), key_lengths=(3, 40)),
    Case(
        "lengths_causal",
        queries=40,
        keys=40,
        causal=True,
        query_lengths=(31, 40),
        key_lengths=(31, 8),
    ),
    Case(
        "lengths_causal_bottom_right",
        causal=True,
        alignment="bottom_right",
        query_lengths=(20, 24),
        key_lengths=(33, 12),
    ),
    Case("lengths_window", queries=48, keys=48, window=(4, 1), key_lengths=(20, 48)),
    Case("lengths_beyond_the_arrays", query_lengths=(99, 24), key_lengths=(41, 2**31 - 1)),
    Case("negative_lengths", query_lengths=(24, -1), key_lengths=(40, -5)),
]

SEGMENTS_AND_MASKS = [
    Case("segments_packed", queries=64, keys=64, segments="sorted"),
    Case("segments_packed_causal", queries=64, keys=64, segments="sorted", causal=True),
    Case("segments_packed_cross", segments="sorted"),
    Case("segments_offsets", queries=24, keys=64, segments="sorted", causal=True, offset=(40, 7)),
    Case("segments_unsorted", queries=40, keys=40, segments="unsorted"),
    Case("segments_unsorted_cross", segments="unsorted"),
    Case(
        "segments_window_lengths",
        queries=56,
        keys=56,
        segments="sorted",
        window=(12, 12),
        key_lengths=(56, 33),
    ),
    Case("mask_full", mask="BNTS"),
    Case("mask_pairs", mask="11TS"),
    Case("mask_keys", mask="B11S"),
    Case("mask_queries", mask="B1T1"),
    Case("mask_heads", mask="1N11", mask_density=0.5),
    Case("mask_scalar", mask="1111", mask_density=1.0),
    Case("mask_hides_everything", mask="B1TS", mask_density=0.0, sinks=True),
    Case("mask_sparse", mask="BNTS", mask_density=0.03, bias="BNTS"),
    Case("mask_causal", queries=40, keys=40, mask="1NTS", causal=True),
]

BIASES = [
    Case(f"bias_{form}", bias=form)
    for form in (
        "BNTS",
        "1NTS",
        "B1TS",
        "11TS",
        "BN1S",
        "BNT1",
        "1N1S",
        "B11S",
        "11T1",
        "1N11",
        "1111",
    )
] + [
    Case("bias_causal", queries=40, keys=40, bias="1NTS", causal=True),
    Case(
        "bias_keys_window_lengths",
        queries=48,
        keys=48,
        bias="B11S",
        window=(8, 2),
        key_lengths=(48, 29),
    ),
    Case("bias_offsets", bias="11TS", causal=True, offset=(0, 16)),
    Case("bias_offset_heads", bias="B1TS", window=(5, 0), offset=(20, 3)),
    Case("bias_multi_query", kv_heads=1, bias="1N1S"),
    Case("bias_one_query", queries=1, bias="BNTS", mask="BNTS"),
    Case("bias_one_key", keys=1, bias="BNTS", mask="BNTS"),
]

LOGITS = [
    Case("soft_cap", soft_cap=2.0),
    Case("soft_cap_bias_causal", queries=40, keys=40, soft_cap=3.0, bias="1NTS", causal=True),
    Case("sinks", sinks=True),
    Case("sinks_causal_lengths", queries=40, keys=40, sinks=True, causal=True, key_lengths=(0, 25)),
    Case("sinks_soft_cap_window", queries=40, keys=40, sinks=True, soft_cap=4.0, window=(6, 0)),
    Case("dropout", dropout=0.3),
    Case("dropout_odd_causal", queries=37, keys=37, dropout=0.5, causal=True),
    Case("dropout_shared", dropout=0.4, shared_dropout=True, queries=33),
    Case("dropout_bias_sinks", dropout=0.1, bias="11TS", sinks=True),
    EVERYTHING,
    replace(
        EVERYTHING,
        name="everything_more_queries",
        queries=53,
        keys=33,
        query_lengths=(53, 40),
        key_lengths=(33, 19),
    ),
    replace(EVERYTHING, name="everything_top_left", alignment="top_left", segments="unsorted"),
]

FLOAT32 = SHAPES + INTERVALS + SEGMENTS_AND_MASKS + BIASES + LOGITS

HALF = [
    replace(case, name=f"{case.name}-{dtype}", dtype=dtype)
    for dtype in ("bfloat16", "float16")
    for case in (
        Case("plain"),
        Case("odd_causal", queries=37, keys=53, causal=True),
        Case("window", queries=48, keys=48, window=(9, 0), causal=True),
        Case("bias", bias="1NTS"),
        Case("bias_float32", bias="1NTS", bias_dtype="float32"),
        Case("bias_keys", bias="1N1S"),
        Case("sinks_soft_cap", sinks=True, soft_cap=3.0),
        Case("dropout", dropout=0.3),
        Case("one_query", queries=1, kv_heads=1),
        EVERYTHING,
    )
]

CASES = FLOAT32 + HALF
assert len({case.name for case in CASES}) == len(CASES)


def chosen(cases: Iterable[Case], names: str) -> list[Any]:
    """Parameters: of the cases these always, the others with --thorough."""
    cases, always = list(cases), names.split()
    assert set(always) <= {case.name for case in cases}, names
    return [
        case if case.name in always else pytest.param(case, marks=pytest.mark.thorough)
        for case in cases
    ]


def thorough(*parameters: Any) -> list[Any]:
    """Sets of a test's parameters that are tried with --thorough alone."""
    return [pytest.param(*each, marks=pytest.mark.thorough) for each in parameters]


def first(count: int, parameters: Iterable[Any]) -> list[Any]:
    """As many of a test's parameters always, the others with --thorough."""
    each = list(parameters)
    return [*each[:count], *thorough(*((x,) for x in each[count:]))]


# Every argument, and every pair of arguments that meet in the code, in few calls.
ORDINARY = """
    odd_sizes one_query_one_key groups_of_three value_dim_smaller
    window_bottom_right_more_queries offsets_each_way lengths_causal_bottom_right negative_lengths
    segments_unsorted_cross mask_hides_everything bias_BN1S bias_keys_window_lengths
    sinks_causal_lengths dropout_shared everything everything-bfloat16 one_query-float16
"""
