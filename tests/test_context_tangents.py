"""Derivatives of derivatives of a sequence over several devices, by each schedule's transfers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.transforms.context.merge import Merged, Moved
from jattn.transforms.rows import sink_weights, with_sinks
from tests.four_devices import run

PRELUDE = """
import re
from functools import partial
import jax, jax.numpy as jnp, numpy as np
import jattn
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jattn.transforms.context import plan, tangents
from tests import formula
from tests.backends import quick_jit

plan.LEAST_ROWS = 1
B, T, N, K, H, D = 1, 32, 8, 4, 8, 4
DEVICES = len(jax.devices())
drawn = iter(jax.random.split(jax.random.key(0), 20))
shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, D), {bias}, (N,)]
x, t = (tuple(jax.random.normal(next(drawn), s) for s in shapes) for _ in "xt")
weights = jax.random.normal(next(drawn), (B, T, N, D))
ids = jnp.sort(jax.random.randint(next(drawn), (B, T), 0, 3))
CUT = (P(None, "s"),) * 3 + (P(None, None, "s") if x[3].shape[2] > 1 else P(), P())
mesh = jax.make_mesh((DEVICES,), ("s",), axis_types=(AxisType.Auto,))
chunked = partial(jattn.memory_efficient_attention, query_chunk_size=16, key_chunk_size=8)

def attend(attention, q, k, v, bias, sinks, ids):
    out, lse = attention(
        q, k, v, bias, sinks=sinks, query_segment_ids=ids, key_value_segment_ids=ids,
        logits_soft_cap=3.0, return_residual=True, {options}
    )
    lse = jnp.where(lse > -jnp.inf, lse, 0)[..., None].astype(out.dtype)
    return out * weights.astype(out.dtype) + lse

def forward(attention, x, t):
    return jax.jvp(lambda *x: attend(attention, *x, ids), x, t)[1]

def forward_reverse(attention, x, t):
    loss = lambda *x: (attend(attention, *x, ids) ** 2).sum()
    return jax.jvp(jax.grad(loss, tuple(range(5))), x, t)

def reverse_forward(attention, x, t):
    along = lambda x, t: (
        jax.jvp(lambda *x: attend(attention, *x, ids), x, t)[1] ** 2).sum()
    return jax.grad(along, (0, 1))(x, t)

def mapped(q, k, v, bias, *, sinks, query_segment_ids, key_value_segment_ids, **options):
    def on_each(q, k, v, bias, sinks, ids):
        with jattn.context_parallel("s", schedule=SCHEDULE, layout=LAYOUT):
            return chunked(
                q, k, v, bias, sinks=sinks, query_segment_ids=ids, key_value_segment_ids=ids,
                **options,
            )
    places = dict(mesh=mesh, in_specs=(*CUT, P(None, "s")), out_specs=(P(None, "s"),) * 2)
    if LAYOUT == "zigzag":
        q, k, v, query_segment_ids = (
            jattn.zigzag(x, DEVICES) for x in (q, k, v, query_segment_ids)
        )
        bias = jattn.zigzag(bias, DEVICES, axis=2) if bias.shape[2] > 1 else bias
    found = jax.shard_map(on_each, **places)(q, k, v, bias, sinks, query_segment_ids)
    return tuple(jattn.unzigzag(x, DEVICES) for x in found) if LAYOUT == "zigzag" else found
"""
SCHEDULES = """
for SCHEDULE, LAYOUT in {calls}:
    for way in {ways}:
        formula.check(quick_jit(partial(way, mapped))(x, t), way, x, t)
"""
TRANSFERS = """
LAYOUT = "contiguous"
held = [
    tuple(jax.device_put(x, NamedSharding(mesh, cut)) for x, cut in zip(of, CUT)) for of in (x, t)
]
for SCHEDULE, allowed in (("ring", "collective-permute"), ("heads", "all-to-all")):
    text = jax.jit(partial(forward_reverse, mapped)).lower(*held).compile().as_text()
    made = set(re.findall(r"(all-gather|all-to-all|collective-permute)\\(", text))
    moved = [
        shape for shape in re.findall(r"f32\\[([0-9,]*)\\][^=]* all-gather\\(", text)
    ]
    assert allowed in made and not moved, (SCHEDULE, made, moved)
"""
# Of a full ring of one piece, whatever the dtype: hops of keys and values, of their tangents too,
# and of their gradients' tangents, which go home. XLA makes one of first hops that are alike.
HOPS = """
plan.LEAST_ROWS, LAYOUT, SCHEDULE = 1 << 15, "contiguous", "ring"
hops, sums = DEVICES - 1, 2 * DEVICES
forward_, tangent, backward, of_backward = 2 * hops, 4 * hops, 2 * hops + sums, 4 * hops + sums
everything = forward_ + tangent + backward + of_backward
counts = {forward: forward_ + tangent, forward_reverse: everything, reverse_forward: everything}
for dtype in (jnp.float32, jnp.bfloat16):
    held = [
        tuple(
            jax.device_put(x.astype(dtype), NamedSharding(mesh, cut)) for x, cut in zip(of, CUT)
        )
        for of in (x, t)
    ]
    for way, most in counts.items():
        text = quick_jit(partial(way, mapped)).lower(*held).compile().as_text()
        made = re.findall(r"= b?f(?:32|16)\\S* (all-gather|all-to-all|collective-permute)\\(", text)
        assert set(made) == {"collective-permute"}, (dtype, way, set(made))
        assert most - 8 <= len(made) <= most, (dtype, way, len(made), most)
"""


UNIT = 2.0


def of_keys(s: Any, ts: Any, v: Any, tv: Any) -> Moved:
    """What one call makes of logits (T, S) and values (S, D), and their tangents: float64."""
    top = s.max(axis=-1)
    weights = np.exp(s - np.where(top == -np.inf, 0, top)[:, None])
    total = np.maximum(weights.sum(axis=-1), np.finfo(float).tiny)
    p = weights / total[:, None]
    mu = (p * ts).sum(axis=-1)
    t_out = (p * (ts - mu[:, None])) @ v + p @ tv
    rest: Any = np.where(top == -np.inf, 0, np.log(total))
    return Moved(Merged(p @ v, top / UNIT, rest), t_out, mu)


@pytest.mark.parametrize("sink", [None, 0.5, 80.0, np.inf], ids=str)
def test_tangents_of_parts_of_keys_are_merged_to_those_of_all(sink: float | None) -> None:
    """Rows of which some see no key of a part or none at all; the logits' tangents are alike."""
    drawn = np.random.default_rng(0)
    s, ts = drawn.standard_normal((2, 5, 9))
    v, tv = drawn.standard_normal((2, 9, 4))
    s[1, :3], s[2, 3:], s[3] = -np.inf, -np.inf, -np.inf
    alike = 1024.0
    ts += alike
    found = Moved.of_nothing((1, 5, 1), 4, jnp.dtype(jnp.float32))
    for keys in (slice(0, 3), slice(3, 7), slice(7, 9)):
        part = of_keys(s[:, keys], ts[:, keys], v[keys], tv[keys])
        found = found.and_of(jax.tree.map(_rows, part), UNIT)
    if sink is not None:
        sinks, t_sink = jnp.float32([sink]), alike + 1.5
        numbers = with_sinks(sinks, *found.merged[1:], UNIT)
        found = found.beside(*numbers, sink_weights(sinks, *numbers, UNIT) * t_sink, UNIT)
        seen = s.max(axis=-1, keepdims=True) > -np.inf
        s = np.concatenate([s, np.where(seen, min(sink, 1e6), -np.inf)], axis=1)
        ts = np.concatenate([ts, np.full_like(ts[:, :1], t_sink)], axis=1)
        v, tv = (np.concatenate([x, np.zeros_like(x[:1])]) for x in (v, tv))
    exact = jax.tree.map(_rows, of_keys(s, ts, v, tv))
    np.testing.assert_allclose(found.merged.out, exact.merged.out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.t_lse, exact.t_lse, rtol=1e-6)
    # Of what the tangents have in common a rounding is in the differences.
    np.testing.assert_allclose(found.t_out, exact.t_out, rtol=1e-5, atol=2 * alike * 2**-24)


def _rows(x: Any) -> jax.Array:
    """(B, T, N, ...) float32."""
    rows: jax.Array = jnp.float32(x)[None, :, None]
    return rows


def program(text: str, bias: str = "(1, N, 1, T)", options: str = "is_causal=True") -> str:
    return PRELUDE.format(bias=bias, options=options) + text


WAYS = "(forward, forward_reverse, reverse_forward)"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("schedule", "bias", "options"),
    [
        *((schedule, "(1, N, 1, T)", "is_causal=True") for schedule in ("gather", "heads", "ring")),
        *(
            (schedule, "(1, 1, T, T)", "is_causal=True, local_window_size=(20, 0)")
            for schedule in ("gather", "ring")
        ),
    ],
)
@pytest.mark.parametrize(("layout", "devices"), [("contiguous", 4), ("zigzag", 2)])
def test_they_are_as_exact_as_on_one_device(
    schedule: str, layout: str, devices: int, bias: str, options: str
) -> None:
    text = SCHEDULES.format(calls=[(schedule, layout)], ways=WAYS)
    run(program(text, bias, options), devices=devices)


@pytest.mark.thorough
def test_no_device_gets_all_keys_but_by_a_gather() -> None:
    run(program(TRANSFERS), devices=4)


@pytest.mark.thorough
@pytest.mark.parametrize("devices", [2, 4])
def test_a_ring_sends_nothing_but_its_hops(devices: int) -> None:
    run(program(HOPS, options=""), devices=devices)
