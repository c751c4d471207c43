"""The devices of a run: its weights are on each, and its sequences are cut over them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from training.config import DataConfig
from training.data import Batch
from training.errors import TrainingError

_AXIS = "sequence"


@dataclasses.dataclass(frozen=True)
class Devices:
    """The first of JAX's devices, as many as `count`; one leaves all where JAX puts it."""

    count: int = 1

    @staticmethod
    def checked(count: int, data: DataConfig) -> "Devices":
        """So many devices for sequences of the lengths that are configured.

        Raises:
            TrainingError: there are fewer, or they do not divide a length, or JAX has several
              processes.
        """
        if jax.process_count() > 1:  # each would write the run's folder
            raise TrainingError(f"train.py runs in one process; JAX has {jax.process_count()}")
        check_count(count, len(jax.devices()))
        check_lengths(count, "--sequence-length", [data.sequence_length])
        if data.short_share > 0:
            short = min(data.short_sequence_length, data.sequence_length)
            check_lengths(count, "--short-sequence-length", [short])
        return Devices(count)

    def batch(self, batch: Batch) -> Batch:
        """The batch with each device's part of its sequences there."""
        if self.count == 1:
            return batch
        placed: Any = jax.device_put((batch.inputs, batch.targets, batch.segment_ids), self._cut)
        return Batch(*placed)

    def state(self, tree: Any) -> Any:
        """Arrays, whole on each device."""
        return tree if self.count == 1 else jax.device_put(tree, self._whole)

    def shape(self, x: Any, *, is_cut: bool) -> jax.ShapeDtypeStruct:
        """That of an array which `batch` or `state` places."""
        if self.count == 1:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        place = self._cut if is_cut else self._whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    @property
    def _cut(self) -> NamedSharding:
        return NamedSharding(_mesh(self.count), PartitionSpec(None, _AXIS))

    @property
    def _whole(self) -> NamedSharding:
        return NamedSharding(_mesh(self.count), PartitionSpec())


def check_count(count: int, found: int | None) -> None:
    """TrainingError unless there are so many devices; where they need not be there: any number."""
    if count < 1 or (found is not None and count > found):
        most = "at least 1" if found is None else f"1 to the number of devices, {found}"
        remedy = ""
        if found is not None and count > found and jax.default_backend() == "cpu":
            remedy = (
                f" (XLA_FLAGS=--xla_force_host_platform_device_count={count} makes a CPU so many)"
            )
        raise TrainingError(f"--sequence-parallel must be {most}; got {count}{remedy}")


def check_lengths(count: int, option: str, lengths: Sequence[int]) -> None:
    """TrainingError if so many devices do not divide one of an option's lengths."""
    for length in lengths:
        if length % count:
            raise TrainingError(
                f"{option} ({length}) must be a multiple of --sequence-parallel ({count})"
            )


@functools.cache
def _mesh(count: int) -> Mesh:
    return jax.make_mesh(
        (count,), (_AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )
