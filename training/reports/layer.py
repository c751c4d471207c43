"""What attention takes as sequences grow: bytes and time, implementation by implementation.

Measured is one attention layer of the model (projections, rotary positions, causal attention): the
compiled gradient of its squared output with respect to its input and weights, at batch 1.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import Attention, TransformerConfig
from models.transformer import AttnImplementation, rotary_table
from training.config import MemoryConfig
from training.reports.place import Place
from training.reports.programs import Built, build_all, out_of_memory
from training.reports.running import run
from training.units import bytes_text, seconds_text

Status = Literal["ok", "fits", "not timed", "too large", "out of memory", "unsupported"]

_MARGIN_GPU, _MARGIN_CPU = 1.1, 2.0  # on expected times; a CPU's first touch of memory takes long
_USABLE = 0.95  # of the free memory; the rest is for what runs beside it, and for gaps


@dataclasses.dataclass(frozen=True)
class Cell:
    """One implementation at one length; what could not be had is None and `note` says why."""

    implementation: AttnImplementation
    sequence_length: int
    status: Status
    note: str = ""
    temp_bytes: int | None = None  # the compiler's account; arguments and results not included
    total_bytes: int | None = None  # with arguments and results
    peak_bytes: int | None = None  # the allocator's account of the same, while it ran
    seconds: float | None = None  # best of three runs, one if that is long

    @property
    def bytes_a_token(self) -> float | None:
        return None if self.temp_bytes is None else self.temp_bytes / self.sequence_length


def what_is_measured(model: TransformerConfig) -> str:
    return (
        f"gradient step of one attention layer, batch 1, {model.num_heads} query and"
        f" {model.num_key_value_heads} key heads of {model.head_dim}, {model.dtype}, causal"
    )


def measure(
    model: TransformerConfig,
    config: MemoryConfig,
    place: Place,
    *,
    stopped: Callable[[], bool],
    status: Callable[[str], None] = lambda text: None,
) -> list[Cell]:
    """The report's cells, by implementation and length; what is there, once `stopped` says so."""
    wanted = [
        (name, length)
        for name in dict.fromkeys(config.memory_implementations)
        for length in sorted(set(config.memory_lengths))
    ]
    lowers = [functools.partial(_lower, model, name, length, place) for name, length in wanted]
    compiled: dict[tuple[str, int], tuple[Cell, Any]] = {}
    for number, built in build_all(lowers, place):
        if stopped():
            return []
        compiled[wanted[number]] = _cell(*wanted[number], built, place), built.program
        status(f"compiled {len(compiled)} of {len(wanted)}")
    deadline = time.perf_counter() + config.memory_seconds
    cells = {key: cell for key, (cell, _) in compiled.items()}
    waiting = _Waiting({key: cells[key] for key in wanted if cells[key].status == "ok"})
    while place.can_run and waiting and not stopped():
        cell, expected = waiting.soonest()
        key = cell.implementation, cell.sequence_length
        margin = _MARGIN_GPU if place.is_gpu else _MARGIN_CPU
        if time.perf_counter() + margin * expected > deadline:
            cells |= waiting.left_out()
            break
        status(f"{cell.implementation}, T = {cell.sequence_length:,}")
        cells[key] = _timed(cell, compiled[key][1], model, deadline)
        waiting.done(cells[key])
    return [cells[key] for key in wanted]


class _Waiting:
    """Cells to be timed, the one that is expected to take least first."""

    def __init__(self, cells: dict[tuple[str, int], Cell]) -> None:
        self._cells = cells  # of an implementation the shorter before the longer
        self._timed: dict[str, Cell] = {}

    def __bool__(self) -> bool:
        return bool(self._cells)

    def soonest(self) -> tuple[Cell, float]:
        """A cell and the seconds that it will take."""
        cell = min(self._cells.values(), key=self._seconds)
        return cell, self._seconds(cell)

    def done(self, cell: Cell) -> None:
        del self._cells[cell.implementation, cell.sequence_length]
        if cell.seconds is not None:
            self._timed[cell.implementation] = cell

    def left_out(self) -> dict[tuple[str, int], Cell]:
        """What is left, for which there is no time."""
        return {
            key: dataclasses.replace(cell, status="not timed", note=self._reason(cell))
            for key, cell in self._cells.items()
        }

    def _seconds(self, cell: Cell) -> float:
        """Attention's time at most quadruples from one length to its double."""
        shorter = self._timed.get(cell.implementation)
        if shorter is None or shorter.seconds is None:
            return 0.0
        return shorter.seconds * (cell.sequence_length / shorter.sequence_length) ** 2

    def _reason(self, cell: Cell) -> str:
        seconds = self._seconds(cell)
        about = f"about {seconds_text(seconds)}, " if seconds else ""
        return f"{about}more than the time budget has left"


def _lower(
    model: TransformerConfig, name: AttnImplementation, length: int, place: Place
) -> jax.stages.Lowered:
    """The gradient step of one layer."""
    config = dataclasses.replace(model, attn_implementation=name)
    graph, weights, x = _shapes(model, name, length)

    def energy(weights: Any, x: jax.Array) -> jax.Array:
        table = rotary_table(jnp.arange(length)[None], config)
        return jnp.square(nnx.merge(graph, weights)(x, table).astype(jnp.float32)).sum()

    return jax.jit(jax.grad(energy, argnums=(0, 1))).lower(*place.placed((weights, x)))


def _shapes(
    model: TransformerConfig, name: AttnImplementation, length: int
) -> tuple[Any, Any, jax.ShapeDtypeStruct]:
    """The layer's graph, its weights and its input."""
    config = dataclasses.replace(model, attn_implementation=name)
    layer = nnx.eval_shape(lambda: Attention(config, rngs=nnx.Rngs(0)))
    graph, weights = nnx.split(layer)
    shape = (1, length, config.hidden_size)
    return graph, weights, jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype))


def _cell(name: AttnImplementation, length: int, built: Built, place: Place) -> Cell:
    """What is known of a compiled step before it runs."""
    if built.memory is None:
        status: Status = "unsupported" if built.refusal else "out of memory"
        return Cell(name, length, status, built.refusal or built.out_of_memory)
    total = built.memory.total
    cell = Cell(
        name,
        length,
        "ok" if place.can_run else "fits",
        temp_bytes=built.memory.temporary,
        total_bytes=total,
    )
    free = place.free_bytes()
    if free is not None and total > _USABLE * free:
        note = f"needs {bytes_text(total)}, {bytes_text(free)} are free"
        return dataclasses.replace(cell, status="too large", note=note)
    return cell


def _timed(cell: Cell, program: Any, model: TransformerConfig, deadline: float) -> Cell:
    shapes = _shapes(model, cell.implementation, cell.sequence_length)[1:]

    def execute(arguments: Any) -> Any:
        jax.block_until_ready(program(*arguments))
        return arguments

    assert cell.total_bytes is not None
    try:
        found = run(
            execute,
            lambda: _random_like(shapes),
            expected_bytes=cell.total_bytes,
            deadline=deadline,
        )
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(cell, status="out of memory", note=out_of_memory(error))
    return dataclasses.replace(cell, seconds=found.seconds, peak_bytes=found.peak_bytes)


def _random_like(shapes: Any) -> Any:
    """Small random numbers, a million of them over and over."""
    draw = np.random.default_rng(0)
    numbers = 0.1 * draw.standard_normal(1 << 20, np.float32)

    def resized(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(np.resize(numbers.astype(leaf.dtype), leaf.shape))

    return jax.tree.map(resized, shapes)
