"""Derivatives of derivatives of a sequence over several devices, by each schedule's transfers."""

from __future__ import annotations

import pytest

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
    return out * weights.astype(out.dtype) + jnp.where(lse > -jnp.inf, lse, 0)[..., None]

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
