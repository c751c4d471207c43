"""The devices of a run: its weights are on each, its batches are cut over them.

In one process they are those over which each sequence is cut. In several they are all, neighbours
along a sequence first, so that what these exchange stays in one process where it can:

    2 processes of 4 devices, --sequence-parallel 2         rows of a batch
                                                         |  0 1 | 2 3     process 0
                                                         v  4 5 | 6 7     process 1
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from training import processes
from training.config import DataConfig
from training.data import Batch
from training.errors import TrainingError

_ROWS, _SEQUENCE = "rows", "sequence"


@dataclasses.dataclass(frozen=True)
class Devices:
    """The first of JAX's devices, as many as are asked for; one leaves all where JAX puts it."""

    along_sequence: int = 1
    along_rows: int = 1

    @staticmethod
    def checked(along_sequence: int, data: DataConfig) -> "Devices":
        """So many devices for sequences of the lengths that are configured.

        Raises:
            TrainingError: there are fewer, or they do not divide a length, or those of several
              processes or a batch cannot be shared out.
        """
        found = len(jax.devices())
        check_count(along_sequence, found)
        check_lengths(along_sequence, "--sequence-length", [data.sequence_length])
        if data.short_share > 0:
            short = min(data.short_sequence_length, data.sequence_length)
            check_lengths(along_sequence, "--short-sequence-length", [short])
        if not processes.are_several():
            return Devices(along_sequence)
        along_rows, left = divmod(found, along_sequence)
        if left:
            raise TrainingError(
                f"--sequence-parallel ({along_sequence}) must divide the number of devices of all"
                f" processes ({found})"
            )
        if data.batch_size % along_rows:
            raise TrainingError(
                f"--batch-size ({data.batch_size}) must be a multiple of {along_rows}: over so many"
                f" of {found} devices its sequences go, each over --sequence-parallel"
                f" ({along_sequence})"
            )
        return Devices(along_sequence, along_rows)

    @property
    def count(self) -> int:
        """How many."""
        return self.along_sequence * self.along_rows

    @property
    def here(self) -> list[jax.Device]:
        """Those of this process."""
        found: list[jax.Device] = jax.local_devices()
        return found[: self.count]

    def batch(self, batch: Batch) -> Batch:
        """The batch with each device's part of it there; all processes have the whole."""
        if self.count == 1:
            return batch
        placed: Any = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, self._cut, x.__getitem__),
            (batch.inputs, batch.targets, batch.segment_ids),
        )
        return Batch(*placed)

    def state(self, tree: Any) -> Any:
        """Arrays, whole on each device; each process has the same, or has a part of them."""
        if self.count == 1:
            return tree
        is_own = all(x.is_fully_addressable for x in jax.tree.leaves(tree))
        if self.whole.is_fully_addressable or not is_own:
            return jax.device_put(tree, self.whole)

        def placed(x: jax.Array) -> jax.Array:
            copies = [jax.device_put(x, device) for device in self.here]
            return jax.make_array_from_single_device_arrays(x.shape, self.whole, copies)

        return jax.tree.map(placed, tree)

    def shape(self, x: Any, *, is_cut: bool) -> jax.ShapeDtypeStruct:
        """That of an array which `batch` or `state` places."""
        if self.count == 1:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        place = self._cut if is_cut else self.whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    @property
    def whole(self) -> NamedSharding:
        """Where the state is, on several."""
        return NamedSharding(_mesh(self.along_rows, self.along_sequence), PartitionSpec())

    @property
    def _cut(self) -> NamedSharding:
        place = PartitionSpec(_ROWS, _SEQUENCE)
        return NamedSharding(_mesh(self.along_rows, self.along_sequence), place)


def own(tree: Any) -> Any:
    """Arrays that each device has whole, as one of this process has them."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


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
def _mesh(*sizes: int) -> Mesh:
    return jax.make_mesh(
        sizes,
        (_ROWS, _SEQUENCE),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: math.prod(sizes)],
    )
