"""The calls that the Hopper forward kernel is tried on, and how far from the formula it may be."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn import eager
from jattn.arguments import AttentionCall, attention_call


@dataclass(frozen=True)
class Call:
    """Shapes and options of a `jattn.dot_product_attention`; what is padding holds NaN."""

    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int | None = None
    dtype: str = "bfloat16"
    options: dict[str, Any] = field(default_factory=dict)
    segments: int = 0  # packed documents a row, ends at random
    mixed_segments: int = 0  # ids in any order
    sinks: bool = False

    def __str__(self) -> str:
        return self.name

    def arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Operands in float32 that the call's dtype can hold, and the other arguments."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        b, t, s = self.batch, self.queries, self.keys
        shapes = {
            "query": (b, t, self.heads, self.head_dim),
            "key": (b, s, self.kv_heads, self.head_dim),
            "value": (b, s, self.kv_heads, self.value_dim or self.head_dim),
        }
        arrays = {
            name: np.array(jnp.asarray(rng.standard_normal(shape), self.dtype), np.float32)
            for name, shape in shapes.items()
        }
        options = dict(self.options)
        for side, names in (("query", ["query"]), ("key_value", ["key", "value"])):
            lengths = options.get(f"{side}_seq_lengths")
            for name in names if lengths is not None else ():
                past = np.arange(arrays[name].shape[1]) >= np.asarray(lengths)[:, None]
                arrays[name][past] = np.nan
            if lengths is not None:
                options[f"{side}_seq_lengths"] = jnp.asarray(lengths, jnp.int32)
        for side, size in (("query", t), ("key_value", s)):
            if self.segments:
                ids = np.sort(rng.integers(0, self.segments, (b, size)), axis=1)
                options[f"{side}_segment_ids"] = jnp.asarray(ids, jnp.int32)
            if self.mixed_segments:
                ids = rng.integers(0, self.mixed_segments, (b, size))
                options[f"{side}_segment_ids"] = jnp.asarray(ids, jnp.int32)
        if self.sinks:
            options["sinks"] = jnp.asarray(rng.standard_normal(self.heads), jnp.float32)
        return arrays, options

    def call(self, dtype: str | None = None) -> AttentionCall:
        """The call, in its own dtype or another."""
        arrays, options = self.arrays()
        q, k, v = (jnp.asarray(x, dtype or self.dtype) for x in arrays.values())
        return attention_call(q, k, v, return_residual=True, **options)


def check(call: Call, out: Any, lse: Any) -> None:
    """At most twice as far from the float32 formula as `eager` in the call's own dtype is.

    The formula runs on a CPU, where float32 products are not rounded; its own error is 2^-16 of
    what a bfloat16 result is rounded by.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        exact, peer = (call.call(dtype) for dtype in ("float32", None))
        exact_out, exact_lse = _floats(eager.attend(exact.spec, exact.operands))
        peer_out, _ = _floats(eager.attend(peer.spec, peer.operands))
    out, lse = _floats((out, lse))
    rounding = float(jnp.finfo(call.dtype).eps) * np.abs(exact_out).max()
    allowed = 2 * np.abs(peer_out - exact_out).max() + rounding
    found = np.abs(out - exact_out).max()
    assert found <= allowed, f"output: error {found:.3g}, allowed {allowed:.3g}"
    sees = np.isfinite(exact_lse)
    np.testing.assert_array_equal(lse[~sees], exact_lse[~sees])
    np.testing.assert_array_equal(out[~sees], 0)
    np.testing.assert_allclose(lse[sees], exact_lse[sees], rtol=2e-5, atol=2e-5)


def _floats(arrays: Any) -> list[Any]:
    return [np.asarray(x, np.float64) for x in arrays]


_CAUSAL = {"is_causal": True}
_BOTTOM = {"is_causal": True, "causal_alignment": "bottom_right"}

# Small enough for the interpreter: every feature, sizes that fit no tile.
SMALL = [
    Call("causal", 1, 200, 200, 2, 1, 64, options=_CAUSAL),
    Call("bottom_right_wider_values", 1, 70, 333, 1, 1, 64, 96, options=_BOTTOM),
    Call(
        "lengths", 2, 150, 300, 1, 1, 64,
        options={"query_seq_lengths": (150, 70), "key_value_seq_lengths": (0, 290)},
    ),
    Call("window", 1, 300, 300, 1, 1, 40, options={"local_window_size": (70, 20)}),
    Call("packed", 1, 300, 300, 1, 1, 64, segments=3, options=_CAUSAL),
    Call("sinks_soft_cap", 1, 130, 130, 2, 2, 64, sinks=True, options={"logits_soft_cap": 5.0}),
    Call(
        "one_query_split_keys", 2, 1, 700, 8, 2, 64, sinks=True,
        options={"key_value_seq_lengths": (3, 650)},
    ),
    Call("negative_scale_float16", 1, 40, 100, 4, 2, 72, dtype="float16", options={"scale": -0.2}),
    Call("one", 1, 1, 1, 1, 1, 8),
]  # fmt: skip

LARGE = [
    *(Call(f"causal_{h}", 2, 520, 520, 4, 2, h, options=_CAUSAL)
      for h in (8, 40, 64, 72, 80, 96, 128, 192, 256)),
    *(Call(f"odd_{h}", 1, 1000, 1001, 2, 2, h) for h in (8, 40, 64, 72, 80, 96, 128, 192, 256)),
    *(Call(f"many_tiles_{h}", 4, 1030, 1030, 8, 8, h, options=_CAUSAL) for h in (64, 128, 256)),
    *(Call(f"many_full_tiles_{h}", 4, 1024, 1024, 8, 8, h) for h in (64, 128, 256)),
    Call("float16", 1, 1024, 2048, 4, 4, 128, dtype="float16", options=_BOTTOM),
    Call("latent", 1, 333, 777, 4, 4, 192, 128, options=_BOTTOM),
    *(
        Call(
            f"lengths_{h}", 3, 700, 900, 4, 2, h,
            options={
                "query_seq_lengths": (700, 100, 0), "key_value_seq_lengths": (899, 17, 333),
            } | options,
        )
        for h, options in ((64, {}), (128, _CAUSAL), (256, {}))
    ),
    Call("left_window", 1, 2000, 2000, 2, 2, 128, options={"local_window_size": (200, 0)}),
    Call("window_both_sides", 1, 2000, 2000, 2, 2, 64, options={"local_window_size": (200, 70)}),
    Call(
        "right_window", 1, 500, 2000, 2, 2, 256,
        options={"local_window_size": (0, 300), "causal_alignment": "bottom_right"},
    ),
    Call("packed_documents", 2, 1500, 1500, 2, 2, 128, segments=5),
    Call("packed_causal", 2, 1500, 1500, 2, 2, 64, segments=5, options=_CAUSAL),
    Call("mixed_segments", 2, 600, 600, 2, 2, 128, mixed_segments=3),
    Call(
        "gemma", 2, 600, 600, 8, 2, 128, sinks=True,
        options={"logits_soft_cap": 5.0, "is_causal": True},
    ),
    Call("few_queries", 2, 5, 3000, 8, 2, 128, sinks=True),
    Call("one_query", 4, 1, 2048, 32, 8, 128),
    Call("one_query_long", 1, 1, 8192, 32, 8, 128, options={"key_value_seq_lengths": (7001,)}),
    Call("three_heads_a_group", 2, 3, 5000, 12, 4, 64),
    Call("one_key_head_256", 2, 20, 500, 16, 1, 256, options=_BOTTOM),
    Call("packed_heads", 1, 60, 700, 8, 2, 128, options=_BOTTOM),
]  # fmt: skip
