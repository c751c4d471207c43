"""Each device computes some heads of a sequence that is cut over all: values, and what is sent."""

from __future__ import annotations

import pytest

from tests.cases import thorough
from tests.four_devices import run

# More pieces than one of each device's heads, lengths that the devices do not divide, and every
# argument that has no row for each query.
VALUES = """
from dataclasses import replace
from jattn.transforms.context import plan
from tests import context
from tests.backends import CHUNKED
from tests.cases import Case

many = Case(
    "many_heads", queries=37, keys=45, heads=8, kv_heads=4, value_dim=16, causal=True,
    alignment="bottom_right", query_lengths=(37, 21), key_lengths=(45, 30), segments="sorted",
    mask="B11S", mask_density=0.9, bias="1N1S", soft_cap=5.0, sinks=True, dropout=0.2,
)
# Of one, two and one of a device's four key heads, each with two query heads.
half = replace(
    many, name="half", dtype="bfloat16", alignment="top_left", offset=(3, 9), mask="1N1S",
    bias="B11S", heads=16, kv_heads=8,
)
# Two pieces for one key head, which has four query heads.
grouped = replace(many, name="grouped", kv_heads=2, dropout=0, mask=None)
mesh = context.mesh_of(2)
plan.LEAST_ROWS = 1
case = {"jit": many, "contiguous": half, "zigzag": grouped}[HOW]
if HOW == "jit":
    found = context.sharded(CHUNKED, case, mesh)
else:
    found = context.through(CHUNKED, case, mesh, layout=HOW, schedule="heads")
context.check(found, case)
"""
SENT = """
import re
from collections import Counter
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jattn
from jattn.transforms.context import plan

plan.LEAST_ROWS = 1
mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
place = NamedSharding(mesh, P(None, "x"))
x = jax.ShapeDtypeStruct((1, 512, 8, 16), jnp.bfloat16, sharding=place)
ids = jax.ShapeDtypeStruct((1, 512), jnp.int32, sharding=place)

def attend(q, k, v, ids):
    return jattn.dot_product_attention(
        q, k, v, is_causal=True, query_segment_ids=ids, key_value_segment_ids=ids
    )

def gradients(*x):
    return jax.grad(lambda *of: attention_sum(*of, x[3]), (0, 1, 2))(*x[:3])

def attention_sum(*x):
    return (attend(*x).astype(jnp.float32) ** 2).sum()

def sent(function):
    text = jax.jit(function).lower(x, x, x, ids).compile().as_text()
    kinds = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    return Counter(re.findall(rf" ({kinds})(?:-start)?\\(", text))

# One exchange for each piece, but that the first one comes and the last one goes home alone. Pieces
# have one, two and one of four heads of two devices. Ids are gathered, of queries and of keys.
kind = "collective-permute" if DEVICES == 2 else "all-to-all"
exchanges = {2: 3, 4: 2}[DEVICES] + 2
for function, passes in ((attend, 1), (gradients, 2)):
    found = sent(function)
    assert found.pop("all-gather") <= 2 * passes and found == {kind: passes * exchanges}, found
"""


@pytest.mark.parametrize("how", ["contiguous", *thorough(("jit",), ("zigzag",))])
def test_values_and_gradients_are_those_of_one_device(how: str) -> None:
    run(f"HOW = {how!r}\n{VALUES}", devices=2, kind="small pieces")


@pytest.mark.parametrize("devices", [2, *thorough((4,))])
def test_a_piece_takes_one_exchange(devices: int) -> None:
    run(f"DEVICES = {devices}\n{SENT}", devices=devices, kind="small pieces")
