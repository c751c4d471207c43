"""Sequences cut over several devices: as exact as on one, and no collective but the schedule's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jattn
from tests.cases import CASES
from tests.four_devices import run

VALUES = """
from tests import context
from tests.backends import CHUNKED
from tests.cases import CASES

cases = {{case.name: case for case in CASES}}
for how, devices, name in {jobs}:
    case, mesh = cases[name], context.mesh_of(devices)
    if how == "jit":
        found = context.sharded(CHUNKED, case, mesh)
    else:
        layout, schedule = how.split()
        if schedule == "heads" and not context.can_be_dealt(case, devices):
            continue
        found = context.through(CHUNKED, case, mesh, layout=layout, schedule=schedule)
    try:
        context.check(found, case)
    except AssertionError as error:
        raise AssertionError((how, devices, name)) from error
"""
WAYS = (
    "jit",
    *(
        f"{layout} {schedule}"
        for layout in ("contiguous", "zigzag")
        for schedule in ("ring", "gather", "heads")
    ),
)
# Each way, and each number of devices; among them all arguments, even and uneven lengths.
CHOSEN = [
    ("jit", 4, "everything"),
    ("contiguous ring", 3, "everything_more_queries"),
    ("zigzag gather", 2, "sinks_causal_lengths"),
]
EXPLAINED = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jattn

mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
place = NamedSharding(mesh, P(None, "x"))

def said(heads, kv_heads, tokens=4096, **options):
    q, k = (
        jax.ShapeDtypeStruct((1, tokens, n, 128), jnp.bfloat16, sharding=place)
        for n in (heads, kv_heads)
    )
    return jattn.explain(q, k, k, **options)

# Keys and values of 1024 tokens, 8 heads and 2 x 128 numbers are 4 MiB, queries and output of 32
# 8 MiB each; three quarters of them leave a device.
for tokens, sent in (
    (4096, "1 piece of 15 MiB, in backward 24 MiB"),
    (65536, "8 pieces of 30 MiB, in backward 48 MiB"),
):
    found = said(32, 8, tokens, is_causal=True, device="H100").sequence
    assert found == (
        f"cut over 4 devices along 'x': heads, {sent}; each device computes its heads, as one "
        "alone would"
    ), found
# Six key heads are not for four devices; of 3 of them on 3 devices, 4.5 MiB.
found = said(24, 6, is_causal=True, device="H100").sequence
assert found == (
    "cut over 4 devices along 'x': gather, 2 pieces of 4.5 MiB, in backward 14 MiB; queries are "
    "exchanged, so that all see as many keys, and results go back: 12 MiB, in backward 18 MiB; the "
    "keys of two pieces take no more memory than a ring's buffers"
), found
found = said(32, 32, is_causal=True, local_window_size=(1024, 0), device="H100").sequence
assert found == (
    "cut over 4 devices along 'x': ring, 1 hop of 16 MiB, in backward 48 MiB and 32 MiB home; the "
    "band leaves 1 of 3 hops"
), found
assert "sequence: cut over 4 devices" in str(said(8, 8))
mask = jax.ShapeDtypeStruct((1, 1, 4096, 4096), jnp.bool_)
assert "heads" not in said(8, 8, mask=mask).sequence
assert said(8, 8, implementation="cudnn", device="A100").sequence is None
assert jattn.explain(*[jnp.ones((1, 8, 2, 8))] * 3).sequence is None
"""


def test_explain_says_what_is_sent() -> None:
    run(EXPLAINED)


GROUPS = 12


def test_values_and_gradients_are_those_of_one_device() -> None:
    run(VALUES.format(jobs=CHOSEN))


@pytest.mark.thorough
@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize("devices", [2, 3, 4, 8])
@pytest.mark.parametrize("way", WAYS)
def test_the_whole_table(way: str, devices: int, group: int) -> None:
    names = [case.name for case in CASES][group::GROUPS]
    jobs = [(way, devices, name) for name in names]
    run(VALUES.format(jobs=jobs), devices=devices, timeout=1800)


COUNTED = """
import math, re
from collections import Counter
from functools import partial
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jattn
from tests import formula

COLLECTIVE = re.compile(
    r" (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\\("
)
B, T, N, K, H = 2, 64, 4, 2, 16
keys = jax.random.split(jax.random.key(0), 4)
q, w = (jax.random.normal(key, (B, T, N, H)) for key in keys[:2])
k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[2:])

def loss(attention, q, k, v, w, **options):
    return (attention(q, k, v, **options) * w).sum()

def counted(compiled):
    return Counter(COLLECTIVE.findall(compiled.as_text()))

def as_planned(found, plan):
    # XLA may send several arrays at once.
    return found.keys() == plan.keys() and found <= Counter(plan)

def sent(compiled, devices):
    # Arrays with head dims, and not the few numbers of rows.
    found = 0
    for line in compiled.as_text().splitlines():
        if made := COLLECTIVE.search(line):
            for sizes in re.findall(r"f32\\[([\\d,]+),16\\]", line[: made.start()]):
                count = 64 * math.prod(map(int, sizes.split(",")))
                found += count * (devices - 1) // devices if "gather" in made[1] else count
    return found

def said(sequence):
    # Bytes forward, and in backward.
    of = lambda text: float(text.split()[0]) * {"B": 1, "KiB": 1024}[text.split()[1]]
    times, once, backward, home = re.search(
        r"(\\d+) \\w+ of (\\S+ \\w+), in backward (\\S+ \\w+)(?: and (\\S+ \\w+) home)?", sequence
    ).groups()
    dealt = re.search(r"go back: (\\S+ \\w+), in backward (\\S+ \\w+)", sequence)
    more = map(of, dealt.groups() if dealt else ["0 B", "0 B"])
    ends = 0, of(home or "0 B")
    return [int(times) * of(x) + y + z for x, y, z in zip((once, backward), more, ends)]

def check(mesh, place, options, forward, gradient, arrays=(q, k, v)):
    held = [jax.device_put(x, NamedSharding(mesh, place)) for x in (*arrays, w)]
    attend = partial(jattn.memory_efficient_attention, **options)
    compiled = jax.jit(attend).lower(*held[:3]).compile()
    assert as_planned(counted(compiled), forward), (options, counted(compiled))
    assert compiled(*held[:3]).sharding.is_equivalent_to(held[0].sharding, 4)
    if mesh.size == 4 and len(mesh.axis_names) == 1:
        explained = said(jattn.explain(*held[:3], **options).sequence)
        assert sent(compiled, 4) == explained[0], (options, sent(compiled, 4), explained)
    of = lambda attention: jax.grad(partial(loss, attention, **options), (0, 1, 2))
    compiled = jax.jit(of(jattn.memory_efficient_attention)).lower(*held).compile()
    assert as_planned(counted(compiled), gradient), (options, counted(compiled))
    if mesh.size == 4 and len(mesh.axis_names) == 1:
        assert sent(compiled, 4) == sum(explained), (options, sent(compiled, 4), explained)
    for x, like in zip(compiled(*held), held):
        assert x.sharding.is_equivalent_to(like.sharding, 4)
    formula.check(
        compiled(*held), lambda attention, *x: of(attention)(*x[:3], x[3].astype(x[0].dtype)),
        *arrays, w,
    )

auto = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
line = P(None, "x")
# Two pieces of keys and of values; of each, queries are dealt by two exchanges, and output and
# numbers of the rows come back by as many. Backward: the same pieces again; queries, output's
# gradient and numbers of the rows are dealt, gradients of queries come back, and of keys and values
# from three others.
check(auto, line, dict(is_causal=True),
      {"all-gather": 4, "collective-permute": 2 * (2 + 2 + 2)},
      {"all-gather": 8, "collective-permute": 2 * (2 + 2 + 2) + 2 * (3 * 2 + 2 + 3)})
# A window that reaches the part before: one hop, of keys and values; their gradients come home.
check(auto, line, dict(is_causal=True, local_window_size=(9, 0)),
      {"collective-permute": 2}, {"collective-permute": 2 + 2 + 4})
"""
EXPLICIT = """
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
with jax.set_mesh(mesh):
    # Queries and keys along one axis, heads along the other; all hops there are.
    check(mesh, P(None, "x", "y"), dict(local_window_size=(9, 0)),
          {"all-gather": 2}, {"all-gather": 2 + 2, "collective-permute": 1})
"""
# Queries of each device, keys on all: nothing is sent, and gradients of keys are added up.
APART = """
few = tuple(x[:, :24] for x in (k, v))
places = line, P(), P(), line
held = [jax.device_put(x, NamedSharding(auto, p)) for x, p in zip((q, *few, w), places)]
of = lambda attention: jax.grad(partial(loss, attention), (0, 1, 2))
compiled = jax.jit(of(jattn.memory_efficient_attention)).lower(*held).compile()
assert set(counted(compiled)) == {"all-reduce"}, counted(compiled)
formula.check(compiled(*held), lambda attention, *x: of(attention)(*x), q, *few, w)
"""


def test_only_the_schedules_collectives_are_compiled() -> None:
    run(COUNTED)


@pytest.mark.thorough
def test_explicit_meshes_and_keys_that_all_have() -> None:
    run(COUNTED[: COUNTED.index("# Two pieces")] + EXPLICIT + APART)


TRANSFORMED = """
from functools import partial
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import jattn
from tests import formula

mesh = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
x = jax.random.normal(jax.random.key(0), (4, 3, 16, 2, 8))
rows = P("data", None, "sequence")
attend = partial(jattn.memory_efficient_attention, is_causal=True)

def loss(attention, x):
    # Rematerialised and mapped.
    call = jax.checkpoint(lambda x: attention(x, x, x, is_causal=True))
    return (jax.vmap(call)(x) ** 2).sum()

def whole(attention, x):
    return jax.grad(partial(loss, attention))(x)

for inside in (False, True):
    for check_vma in (False, True):
        def own(x):
            with jattn.context_parallel("sequence", schedule="ring"):
                own_loss = partial(loss, jattn.memory_efficient_attention)
                if inside:
                    return jax.grad(own_loss)(x)
                return jax.lax.psum(own_loss(x), ("data", "sequence"))
        mapped = partial(jax.shard_map, own, mesh=mesh, in_specs=rows, check_vma=check_vma)
        found = mapped(out_specs=rows) if inside else jax.grad(mapped(out_specs=P()))
        formula.check(jax.jit(found)(x), whole, x)
"""


@pytest.mark.thorough
def test_mapped_rematerialised_and_differentiated_inside_and_out() -> None:
    run(TRANSFORMED)


def test_what_cannot_be_is_refused_by_name() -> None:
    x = jnp.ones((1, 6, 2, 8))
    with (
        pytest.raises(ValueError, match="context_parallel\\('sequence'\\) is for calls inside"),
        jattn.context_parallel("sequence"),
    ):
        jattn.dot_product_attention(x, x, x)
    for wrong, named in (
        (
            {"schedule": "circle"},
            "schedule must be 'gather' or 'heads' or 'ring', or None, got 'circle'",
        ),
        ({"layout": "striped"}, "layout must be 'contiguous' or 'zigzag', got 'striped'"),
        ({"axis_name": 3}, "axis_name must be a mesh axis, several, or None, got 3"),
    ):
        context = jattn.context_parallel(**{"axis_name": "sequence"} | wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=named), context:
            pass
    with jattn.context_parallel("sequence"), jattn.context_parallel(None):
        assert jattn.dot_product_attention(x, x, x).shape == x.shape
    with pytest.raises(ValueError, match="a zigzag over 4 devices needs a multiple of 8 positions"):
        jattn.zigzag(x, 4)
    for permute in (jattn.zigzag, jattn.unzigzag):
        with pytest.raises(ValueError, match="devices must be at least 1, got 0"):
            permute(jnp.arange(16), 0, axis=0)


REFUSED = """
from functools import partial
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import jattn

mesh = jax.make_mesh((2,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
x = jnp.ones((1, 6, 2, 8))
line = P(None, "sequence")

def refusal(attention, x=x, **context):
    def own(x):
        with jattn.context_parallel("sequence", **context):
            return attention(x, x, x)
    try:
        jax.shard_map(own, mesh=mesh, in_specs=line, out_specs=line)(x)
    except (ValueError, jattn.UnsupportedAttentionError) as error:
        return str(error)
    raise AssertionError("not refused")

assert "eager: the sequence is cut along 'sequence'" in refusal(jattn.eager_attention)
assert "T 3 and S 3 a device" in refusal(jattn.dot_product_attention, layout="zigzag")
def along_rows(*x):
    with jattn.context_parallel("rows"):
        return jattn.dot_product_attention(*x)
assert "manual axes here: 'sequence'" in refusal(along_rows)
assert "schedule 'heads' does not apply: 3 key heads are not a multiple of 2 devices" in refusal(
    jattn.dot_product_attention, jnp.ones((1, 6, 3, 8)), schedule="heads"
)
assert "'heads' does not apply: a bias or mask has a row for each query" in refusal(
    lambda *x: jattn.dot_product_attention(*x, jnp.zeros((1, 2, 3, 6))), schedule="heads"
)
bias = jnp.zeros((1, 2, 3, 3))
assert "bias must broadcast to (B, N, T, S) = (1, 2, 3, 6)" in refusal(
    lambda *x: jattn.dot_product_attention(*x, bias)
)
"""


@pytest.mark.thorough
def test_what_a_device_cannot_do_is_refused_by_name() -> None:
    run(REFUSED, devices=2)


def test_zigzag_is_undone() -> None:
    x = jnp.arange(24).reshape(2, 12)
    for devices in (1, 2, 3, 6):
        there = jattn.zigzag(x, devices)
        assert (jattn.unzigzag(there, devices) == x).all()
    first, second = jnp.split(jattn.zigzag(x, 2)[0], 2)
    assert first.tolist() == [0, 1, 2, 9, 10, 11]
    assert second.tolist() == [3, 4, 5, 6, 7, 8]
    assert jax.eval_shape(lambda x: jattn.zigzag(x, 3), x).shape == x.shape
