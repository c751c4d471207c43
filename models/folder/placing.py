"""Arrays on devices, read from a file slice by slice."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from models.folder.table import Transform
from models.folder.tensors import StoredTensor

__all__ = ["Placement", "place"]

type Placement = Sharding | Callable[[str, tuple[int, ...]], Sharding] | None
"""Where parameters go: one sharding for all, or a function of a parameter's path and shape, such as
`lambda path, shape: NamedSharding(mesh, P("model") if len(shape) == 2 else P())`. None for the
default device."""


def place(
    tensor: StoredTensor,
    transform: Transform,
    dtype: np.dtype[Any],
    sharding: Sharding | None,
) -> jax.Array:
    """The parameter that a tensor is stored as, on its devices when this returns.

    Each device's slice is read once for all devices that hold it, and its host memory is given back
    before the next is read; on a CPU that memory is the array's.
    """
    shape = transform.shape(tensor.shape)
    if sharding is None:
        whole = tuple(slice(None) for _ in shape)
        array: jax.Array = jax.device_put(_read(tensor, transform, whole, dtype))
        array.block_until_ready()
        return array
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    slices = []
    for bounds, devices in holders.items():
        part = _read(tensor, transform, tuple(slice(*ends) for ends in bounds), dtype)
        for device in devices:
            there = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            slices.append(jax.device_put(part, there))
        jax.block_until_ready(slices)
        del part
    return jax.make_array_from_single_device_arrays(shape, sharding, slices, dtype=dtype)


def sharding_of(placement: Placement, path: str, shape: tuple[int, ...]) -> Sharding | None:
    """Where one parameter goes.

    Raises:
        ValueError: the sharding does not divide the parameter; the text names it.
        TypeError: it is no sharding.
    """
    sharding = placement
    if callable(placement) and not isinstance(placement, Sharding):
        sharding = placement(path, shape)
    if placement is None:
        return None
    if not isinstance(sharding, Sharding):
        raise TypeError(
            "sharding must be a jax.sharding.Sharding, or a function of a parameter's path and"
            f" shape that returns one; for {path} it is {sharding!r}"
        )
    try:
        sharding.shard_shape(shape)
    except (ValueError, IndexError) as error:  # the latter for more axes than there are
        reason = " ".join(str(error).split())
        raise ValueError(f"{sharding} does not fit {path}, {shape}: {reason}") from None
    return sharding


def _read(
    tensor: StoredTensor, transform: Transform, index: tuple[slice, ...], dtype: np.dtype[Any]
) -> Any:
    return transform.array(tensor.read(transform.slices(index), dtype))
