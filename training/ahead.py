"""The update, compiled while weights are drawn and the held-out text is measured the first time.

Lowering holds Python's lock and is done at once; XLA's part runs in threads.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from training.config import TrainConfig
from training.data import Batch
from training.devices import Devices
from training.step import StepScalars, TrainState, abstract_state, train_step

_Shape = tuple[int, ...]


class Updates:
    """`train_step` for the batches of one run, each shape compiled once.

    Args:
        config: the run's configuration; the shapes of its batches follow from it.
        devices: where it runs.
    """

    def __init__(self, config: TrainConfig, devices: Devices) -> None:
        self._config = config
        self.devices = devices
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._programs: dict[_Shape, Future[Any]] = {}

    def prepare(self, batch: Batch) -> None:
        """Begins to compile for batches of this shape, unless that has begun."""
        shape = batch.inputs.shape
        if shape in self._programs:
            return
        state = abstract_state(self._config)
        lowered = train_step.lower(
            jax.tree.map(lambda x: self.devices.shape(x, is_cut=False), state),
            *self._shapes(batch),
            config=self._config.optimizer,
        )
        self._programs[shape] = self._pool.submit(lowered.compile)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepScalars]:
        """One update; the state given is used up."""
        self.prepare(batch)
        program = self._programs[batch.inputs.shape].result()
        batch = self.devices.batch(batch)
        updated, scalars = program(state, batch.inputs, batch.targets, batch.segment_ids)
        placed: TrainState = self.devices.state(updated)
        return placed, scalars

    def close(self) -> None:
        """Begins nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _shapes(self, batch: Batch) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        arrays = (batch.inputs, batch.targets, batch.segment_ids)
        return tuple(None if x is None else self.devices.shape(x, is_cut=True) for x in arrays)
