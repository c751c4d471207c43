"""The programs of a run, compiled at the same time and before they are needed.

Lowering holds Python's lock and is done at once; XLA's part runs in threads, and Mosaic's beside it
(`kernels_ahead`). What takes longest is begun first:

    lower      update | initial state | loss of held-out text
    compile            update --------------------------------
                                       initial state ----, which runs
                                                       loss ------

What an earlier start of the same kept (`kept_programs`) is loaded, not lowered and compiled, in the
order in which it runs.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from training import compiler
from training.config import TrainConfig
from training.data import NO_TARGET, Batch
from training.devices import Devices
from training.kept_programs import KeptPrograms
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
_AT_ONCE = 4  # three programs, and what waits for the first to draw the weights


class Programs:
    """What the device runs for one run's batches, each shape compiled once.

    Args:
        config: the run's configuration; the shapes of its batches follow from it.
        devices: where it runs.
        kept: programs of earlier starts; None on several devices and of a folder's model.
    """

    def __init__(
        self, config: TrainConfig, devices: Devices, kept: KeptPrograms | None = None
    ) -> None:
        self._config = config
        self.devices = devices
        self._kept = kept
        self._pool = ThreadPoolExecutor(max_workers=_AT_ONCE)
        self._loader = ThreadPoolExecutor(max_workers=1)  # in order: loading holds Python's lock
        self._initial: Future[Any] | None = None
        self._updates: dict[_Shape, Future[Any]] = {}
        self._losses: dict[_Shape, Future[Any]] = {}
        self._to_keep: list[tuple[Future[Any], tuple[Any, ...]]] = []

    def prepare_initial_state(self) -> None:
        """Begins to draw the weights; of a folder's model there is nothing to."""
        config = self._config
        if config.fine_tune.model is None:
            place = None if self.devices.count == 1 else self.devices.whole
            draw = jax.jit(new_state, static_argnums=(0, 1), out_shardings=place)
            program = self._begun(
                lambda: draw.lower(config.model, config.optimizer),
                "initial-state",
                config.model,
                config.optimizer,
            )
            self._initial = self._pool.submit(lambda: program.result()())

    def prepare_update(self, batch: Batch) -> None:
        """Begins to compile the update for batches of this shape, unless that has begun."""
        if batch.inputs.shape not in self._updates:
            self._updates[batch.inputs.shape] = self._begun(
                lambda: train_step.lower(
                    self._state_shapes(), *self._shapes(batch), config=self._config.optimizer
                ),
                *_update(self._config, batch.inputs.shape),
            )

    def is_kept(self, batch: Batch) -> bool:
        """Whether an earlier start kept the update for batches of this shape."""
        kept = self._kept
        return kept is not None and kept.has(*_update(self._config, batch.inputs.shape))

    def prepare_held_out_loss(self, batch: Batch) -> None:
        """Begins to compile the loss of batches of this shape, unless that has begun."""

        def lowered() -> jax.stages.Lowered:
            state = self._state_shapes()
            return held_out_loss.lower(state.params, state.graph, *self._shapes(batch))

        if batch.inputs.shape not in self._losses:
            config = self._config
            of = (config.model, config.data.pack_documents, batch.inputs.shape)
            self._losses[batch.inputs.shape] = self._begun(lowered, "held-out-loss", *of)

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

    def keep(self) -> None:
        """Keeps what has been compiled since the last time for later starts.

        That holds Python's lock for half a second, which an update that is awaited would wait for.
        """
        done = [each for each in self._to_keep if each[0].done()]
        self._to_keep = [each for each in self._to_keep if each not in done]
        for program, name in done:
            if self._kept is not None and program.exception() is None:
                self._kept.put(program.result(), *name)

    def close(self) -> None:
        """Begins nothing more."""
        for pool in (self._pool, self._loader):
            pool.shutdown(wait=False, cancel_futures=True)

    def _begun(self, lower: Callable[[], jax.stages.Lowered], *name: Any) -> Future[Any]:
        """The program, being loaded if an earlier start kept it, else lowered now and compiled."""
        kept = self._kept
        if kept is None:
            return self._pool.submit(_compiled, lower())
        if kept.has(*name):
            return self._loader.submit(kept.get, lambda: _compiled(lower()), *name)
        program = self._pool.submit(_compiled, lower())
        self._to_keep.append((program, name))
        return program

    def _state_shapes(self) -> TrainState:
        shapes: TrainState = jax.tree.map(
            lambda x: self.devices.shape(x, is_cut=False), abstract_state(self._config)
        )
        return shapes

    def _shapes(self, batch: Batch) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        arrays = (batch.inputs, batch.targets, batch.segment_ids)
        return tuple(None if x is None else self.devices.shape(x, is_cut=True) for x in arrays)


def is_kept(config: TrainConfig, kept: KeptPrograms | None) -> bool:
    """Whether there is an update of whole sequences, so that it is known that the model runs."""
    shape = (config.data.batch_size, config.data.sequence_length)
    return kept is not None and kept.has(*_update(config, shape))


def _update(config: TrainConfig, shape: _Shape) -> tuple[Any, ...]:
    """What the update is called, and all that it follows from in a configuration."""
    return "update", config.model, config.optimizer, config.data.pack_documents, shape


def _compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    is_gpu = jax.default_backend() == "gpu"
    return lowered.compile(compiler_options=compiler.options(is_gpu=is_gpu))
