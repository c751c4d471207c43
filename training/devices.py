"""The devices of a run: its weights are on each, and its sequences are cut over them."""

import dataclasses
import functools
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
            TrainingError: there are fewer, or they do not divide a length.
        """
        found = len(jax.devices())
        if not 1 <= count <= found:
            raise TrainingError(
                f"--sequence-parallel must be 1 to the number of devices, {found}; got {count}"
            )
        lengths = {"--sequence-length": data.sequence_length}
        if data.short_share > 0:
            short = min(data.short_sequence_length, data.sequence_length)
            lengths["--short-sequence-length"] = short
        for option, length in lengths.items():
            if length % count:
                raise TrainingError(
                    f"{option} ({length}) must be a multiple of --sequence-parallel ({count})"
                )
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


@functools.cache
def _mesh(count: int) -> Mesh:
    return jax.make_mesh(
        (count,), (_AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )
