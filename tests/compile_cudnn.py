"""Compiles calls for absent H200s that cuDNN takes; prints its custom calls and what is gathered.

As JSON lines. cuDNN itself is asked only where a program is loaded.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tests.hopper.absent import h200s  # isort: skip

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from tests import cudnn_calls

CUSTOM_CALL = re.compile(r'custom_call_target="__cudnn\$fmhaSoftmax(Backward)?"')
MOVES = re.compile(r" (?:all-gather|all-to-all|collective-permute)(?:-start)?\(")
ROWS = P("x", None, "y")
KEEP = jax.checkpoint_policies.save_only_these_names(*jattn.CHECKPOINT_NAMES)

attend = partial(cudnn_calls.CUDNN, is_causal=True)


def loss(attend: Callable[..., Any], *qkv: jax.Array) -> jax.Array:
    return jnp.sin(attend(*qkv).astype(jnp.float32)).sum()


def gradient(attend: Callable[..., Any]) -> Callable[..., Any]:
    return jax.value_and_grad(partial(loss, attend), (0, 1, 2))


def mapped(*qkv: jax.Array) -> Any:
    """Rows along the second axis, their gradients outside."""
    return jax.vmap(gradient(attend), in_axes=1)(*qkv)


def on_one() -> Iterator[tuple[str, Callable[..., Any], int]]:
    """Calls by name, and the axes that are before those of one call."""
    yield "forward", attend, 0
    yield "gradient", gradient(attend), 0
    yield "mapped", mapped, 1
    yield "again", gradient(jax.checkpoint(attend)), 0
    yield "kept", gradient(jax.checkpoint(attend, policy=KEEP)), 0


def on_four() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The same, by the partitioner and by hand."""
    yield "by the partitioner", gradient(attend)
    for check in (True, False):
        by_hand = jax.shard_map(attend, in_specs=(ROWS,) * 3, out_specs=ROWS, check_vma=check)
        yield f"by shard_map, {check}", gradient(by_hand)


def shapes(mesh: Mesh, place: P, *more: int) -> list[jax.ShapeDtypeStruct]:
    """Of query, key and value, with half as many key heads."""
    own = NamedSharding(mesh, place)
    return [
        jax.ShapeDtypeStruct((4, *more, 128, heads, 64), jnp.bfloat16, sharding=own)
        for heads in (4, 2, 2)
    ]


def show(name: str, function: Callable[..., Any], arguments: list[jax.ShapeDtypeStruct]) -> None:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    backward = [bool(which) for which in CUSTOM_CALL.findall(text)]
    found = {"jax": jax.__version__, "call": name, "moves": len(MOVES.findall(text))}
    found |= {"forward": backward.count(False), "backward": backward.count(True)}
    print(json.dumps(found), flush=True)


def main() -> None:
    """One line for each call."""
    with cudnn_calls.assumed():
        with h200s(1) as mesh:
            for name, function, axes in on_one():
                show(name, function, shapes(mesh, P(), *(3,) * axes))
        with h200s(2, 2) as mesh:
            for name, function in on_four():
                show(name, function, shapes(mesh, ROWS))


if __name__ == "__main__":
    main()
