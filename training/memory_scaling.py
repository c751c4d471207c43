"""What attention costs as sequences grow: bytes and time, implementation by implementation.

Measured is one attention layer of the model (projections, rotary positions, causal attention): the
compiled gradient of its squared output with respect to its input and weights, at batch 1. Bytes are
the compiler's own account of the temporary memory of that step, arguments and results not included.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich import box
from rich.table import Table

from jattn import UnsupportedAttentionError
from models import Attention, TransformerConfig
from models.transformer import AttnImplementation, rotary_table
from training.config import MemoryConfig
from training.errors import one_line
from training.free_memory import free_bytes

Status = Literal["ok", "not timed", "too large", "out of memory", "unsupported"]

_REPEATS = 3
_LONG = 0.5  # seconds after which one run is measure enough
_MARGIN = 2  # on expected times: first touching memory costs as much again
_USABLE = 0.9  # of the free memory; the rest is for what runs beside it


@dataclasses.dataclass(frozen=True)
class Cell:
    """One implementation at one length; what could not be had is None and `note` says why."""

    implementation: AttnImplementation
    sequence_length: int
    status: Status
    note: str = ""
    temp_bytes: int | None = None
    total_bytes: int | None = None  # with arguments and results
    seconds: float | None = None  # best of three runs, one if that is long


def what_is_measured(model: TransformerConfig) -> str:
    return (
        f"gradient step of one attention layer, batch 1, {model.num_heads} query and"
        f" {model.num_key_value_heads} key heads of {model.head_dim}, {model.dtype}, causal"
    )


def measure(
    model: TransformerConfig, config: MemoryConfig, *, stopped: Callable[[], bool]
) -> Iterator[Cell]:
    """Cells as they are measured, short lengths first; ends early once `stopped` says so."""
    deadline = time.perf_counter() + config.memory_seconds
    timed: dict[str, Cell] = {}
    for length in sorted(config.memory_lengths):
        expected = {
            name: _expected_seconds(length, timed.get(name))
            for name in config.memory_implementations
        }
        for name in sorted(expected, key=expected.__getitem__):  # the slowest takes what is left
            if stopped():
                return
            cell = _measure(model, name, length, deadline, expected[name])
            if cell.seconds is not None:
                timed[name] = cell
            yield cell


def _measure(
    model: TransformerConfig,
    name: AttnImplementation,
    length: int,
    deadline: float,
    expected: float,
) -> Cell:
    cell = Cell(name, length, "ok")
    try:
        lowered, shapes = _gradient_step(model, name, length)
        compiled = lowered.compile()
    except UnsupportedAttentionError as error:
        return dataclasses.replace(cell, status="unsupported", note=one_line(error))
    except jax.errors.JaxRuntimeError as error:
        return _out_of_memory(cell, error)
    memory = compiled.memory_analysis()
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    cell = dataclasses.replace(cell, temp_bytes=memory.temp_size_in_bytes, total_bytes=total)
    free = free_bytes(jax.devices()[0])
    if free is not None and total > _USABLE * free:
        note = f"needs {bytes_text(total)}, {bytes_text(free)} are free"
        return dataclasses.replace(cell, status="too large", note=note)
    if time.perf_counter() + _MARGIN * expected > deadline:
        note = f"about {expected:.0f} s, more than the time budget has left"
        return dataclasses.replace(cell, status="not timed", note=note)
    try:
        return dataclasses.replace(
            cell, seconds=_best_time(compiled, _random_like(shapes), deadline)
        )
    except jax.errors.JaxRuntimeError as error:
        return _out_of_memory(cell, error)


def _gradient_step(model: TransformerConfig, name: AttnImplementation, length: int) -> Any:
    """The gradient step, lowered, and the shapes of its arguments."""
    config = dataclasses.replace(model, attn_implementation=name)
    layer = nnx.eval_shape(lambda: Attention(config, rngs=nnx.Rngs(0)))
    graph, weights = nnx.split(layer)
    x = jax.eval_shape(lambda: jnp.zeros((1, length, config.hidden_size), config.dtype))

    def energy(weights: nnx.State[Any, Any], x: jax.Array) -> jax.Array:
        table = rotary_table(jnp.arange(length)[None], config)
        return jnp.square(nnx.merge(graph, weights)(x, table).astype(jnp.float32)).sum()

    return jax.jit(jax.grad(energy, argnums=(0, 1))).lower(weights, x), (weights, x)


def _random_like(shapes: Any) -> Any:
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * draw.standard_normal(leaf.shape, np.float32), leaf.dtype),
        shapes,
    )


def _best_time(compiled: Any, arguments: Any, deadline: float) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        best = min(best, time.perf_counter() - started)
        if best > _LONG or time.perf_counter() + best > deadline:
            break
    return best


def _expected_seconds(length: int, shorter: Cell | None) -> float:
    """Attention's time at most quadruples from one length to its double."""
    if shorter is None or shorter.seconds is None:
        return 0.0
    return shorter.seconds * (length / shorter.sequence_length) ** 2


def _out_of_memory(cell: Cell, error: jax.errors.JaxRuntimeError) -> Cell:
    if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
        raise error
    return dataclasses.replace(cell, status="out of memory", note=one_line(error)[:200])


def as_table(cells: Sequence[Cell]) -> Table:
    """Lengths down, memory and time of each implementation across."""
    table = Table(box=box.SIMPLE_HEAD)
    names = list(dict.fromkeys(cell.implementation for cell in cells))
    table.add_column("\nT", justify="right")
    for name in names:
        table.add_column(f"{name}\nmemory", justify="right")
        table.add_column("\ntime", justify="right")
    found = {(cell.implementation, cell.sequence_length): cell for cell in cells}
    before: dict[str, int | None] = dict.fromkeys(names)
    for length in dict.fromkeys(cell.sequence_length for cell in cells):
        row = [f"{length:,}"]
        for name in names:
            cell = found.get((name, length))
            row += _entries(cell, before[name]) if cell else ["", ""]
            before[name] = cell.temp_bytes if cell else None
        table.add_row(*row)
    return table


def _entries(cell: Cell, before: int | None) -> list[str]:
    if cell.temp_bytes is None:
        return [cell.status, ""]
    growth = f"  x{cell.temp_bytes / before:3.1f}" if before else " " * 6
    seconds = cell.status if cell.seconds is None else seconds_text(cell.seconds)
    return [bytes_text(cell.temp_bytes) + growth, seconds]


def notes(cells: Sequence[Cell]) -> list[str]:
    """Why cells lack a number: a line for each implementation and status, the first cell's why."""
    alike: dict[tuple[str, Status], list[Cell]] = {}
    for cell in cells:
        if cell.note:
            alike.setdefault((cell.implementation, cell.status), []).append(cell)
    return [
        f"{name}, T = {' '.join(f'{cell.sequence_length:,}' for cell in found)}:"
        f" {status}: {found[0].note}"
        for (name, status), found in alike.items()
    ]


def as_json(cells: Sequence[Cell], model: TransformerConfig) -> dict[str, Any]:
    return {
        "measured": what_is_measured(model),
        "device": jax.devices()[0].device_kind,
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }


def bytes_text(count: float) -> str:
    """'3.2 MiB', at most four characters of number."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if count < 999.5:
            break
        count, unit = count / 1024, larger
    return f"{count:.1f} {unit}" if count < 99.95 and unit != "B" else f"{count:.0f} {unit}"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
