"""The programs of a run, compiled at the same time and before they are needed.

Lowering holds Python's lock and is done at once; XLA's part runs in threads, and Mosaic's beside it
(`kernels_ahead`). What takes longest is begun first:

    lower      initial state | update | loss of held-out text
    compile                  initial state ----, which runs
                                       update ---------------------------
                                                              loss ------
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from training import compiler
from training.config import TrainConfig
from training.data import NO_TARGET, Batch
from training.devices import Devices
from training.program_memory import Memory, memory_of
from training.step import (
    StepScalars,
    TrainState,
    abstract_state,
    held_out_loss,
    initial_state,
    new_state,
    train_step,
)

_Shape = tuple[int, ...]
_AT_ONCE = 3


class Programs:
    """What the device runs for one run's batches, each shape compiled once.

    Args:
        config: the run's configuration; the shapes of its batches follow from it.
        devices: where it runs.
    """

    def __init__(self, config: TrainConfig, devices: Devices) -> None:
        self._config = config
        self.devices = devices
        self._pool = ThreadPoolExecutor(max_workers=_AT_ONCE)
        self._initial: Future[Any] | None = None
        self._updates: dict[_Shape, Future[Any]] = {}
        self._losses: dict[_Shape, Future[Any]] = {}

    def prepare_initial_state(self) -> None:
        """Begins to draw the weights; of a folder's model there is nothing to."""
        if self._config.fine_tune.model is None:
            place = None if self.devices.count == 1 else self.devices.whole
            draw = jax.jit(new_state, static_argnums=(0, 1), out_shardings=place)
            lowered = draw.lower(self._config.model, self._config.optimizer)
            self._initial = self._pool.submit(lambda: _compiled(lowered)())

    def prepare_update(self, batch: Batch) -> None:
        """Begins to compile the update for batches of this shape, unless that has begun."""
        if batch.inputs.shape not in self._updates:
            self._updates[batch.inputs.shape] = self._pool.submit(
                _compiled,
                train_step.lower(
                    self._state_shapes(), *self._shapes(batch), config=self._config.optimizer
                ),
            )

    def prepare_held_out_loss(self, batch: Batch) -> None:
        """Begins to compile the loss of batches of this shape, unless that has begun."""
        if batch.inputs.shape not in self._losses:
            state = self._state_shapes()
            self._losses[batch.inputs.shape] = self._pool.submit(
                _compiled, held_out_loss.lower(state.params, state.graph, *self._shapes(batch))
            )

    def initial_state(self) -> TrainState:
        """The state before the first step, on the run's devices."""
        if self._initial is None:
            found = initial_state(self._config)
        else:  # kept here no longer, as the first update uses it up
            found, self._initial = self._initial.result(), None
        placed: TrainState = self.devices.state(found)
        return placed

    def memory_of_update(self, batch: Batch) -> Memory:
        """What an update for batches of this shape takes; waits for its compiler."""
        self.prepare_update(batch)
        return memory_of(self._updates[batch.inputs.shape].result())

    def memory_of_held_out_loss(self, batch: Batch) -> Memory:
        """The same of the loss."""
        self.prepare_held_out_loss(batch)
        return memory_of(self._losses[batch.inputs.shape].result())

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepScalars]:
        """One update; the state given is used up."""
        self.prepare_update(batch)
        program = self._updates[batch.inputs.shape].result()
        batch = self.devices.batch(batch)
        updated, scalars = program(state, batch.inputs, batch.targets, batch.segment_ids)
        placed: TrainState = self.devices.state(updated)
        return placed, scalars

    def held_out_loss(self, state: TrainState, batches: Iterable[Batch]) -> float:
        """Mean over all targets of all batches, in nats."""
        losses, counts = [], []
        for batch in batches:
            self.prepare_held_out_loss(batch)
            program = self._losses[batch.inputs.shape].result()
            counts.append(np.count_nonzero(batch.targets != NO_TARGET))
            batch = self.devices.batch(batch)
            losses.append(program(state.params, batch.inputs, batch.targets, batch.segment_ids))
        return float(np.average(jax.device_get(losses), weights=counts))

    def close(self) -> None:
        """Begins nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _state_shapes(self) -> TrainState:
        shapes: TrainState = jax.tree.map(
            lambda x: self.devices.shape(x, is_cut=False), abstract_state(self._config)
        )
        return shapes

    def _shapes(self, batch: Batch) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        arrays = (batch.inputs, batch.targets, batch.segment_ids)
        return tuple(None if x is None else self.devices.shape(x, is_cut=True) for x in arrays)


def _compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    is_gpu = jax.default_backend() == "gpu"
    return lowered.compile(compiler_options=compiler.options(is_gpu=is_gpu))
