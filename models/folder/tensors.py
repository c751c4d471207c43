"""The tensors of one safetensors file, and any slice of one, read into memory of its own.

    8 bytes     length of the header, little endian
    header      JSON: name -> dtype, shape, first and last byte of the tensor in what follows
    bytes       the tensors, C order, little endian, without gaps

The library of the format checks the header. Bytes are read with `pread`, run by run, straight to
where they are wanted: pages of a mapped file count as memory of this process as long as they stay,
and a second copy of a tensor would be the largest array of all.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from models.folder.errors import FolderError
from models.folder.files import is_lfs_pointer, lfs_pointer, unreadable

__all__ = ["DTYPES", "StoredTensor", "empty", "read_header"]

Index = tuple[slice, ...]
AnyArray = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that weights may be stored in, by safetensors' names."""

_CHUNK = 1 << 22  # elements that are read at once before they are cast
_ALIGNMENT = 64  # bytes; a CPU's arrays of JAX take memory that begins so as it is


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    name: str
    file: Path
    dtype: str
    """By safetensors' name; of a weight one of `DTYPES`."""

    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    def read(self, index: Index, dtype: np.dtype[Any]) -> AnyArray:
        """A slice, cast.

        Args:
            index: a slice of step 1 for each axis.
            dtype: what the result has.

        Returns:
            An array that owns its memory, whose pages are the only ones the reading takes but for
            a few MiB.

        Raises:
            FolderError: the file has become shorter, or is of a dtype that no weight has.
        """
        stored = self.stored_dtype
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        out = empty(tuple(end - start for start, end in bounds), dtype)
        flat, done = out.reshape(-1), 0
        try:
            with self.file.open("rb", buffering=0) as file:
                for start, count in _runs(self.shape, bounds):
                    for begin in range(0, count, _CHUNK):
                        part = flat[done : done + min(_CHUNK, count - begin)]
                        self._read_run(file.fileno(), start + begin, part, stored)
                        done += len(part)
        except OSError as error:
            raise unreadable(self.file, error) from None
        return out

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """NumPy's name of it.

        Raises:
            FolderError: it is none of `DTYPES`.
        """
        if self.dtype not in DTYPES:
            raise FolderError(
                f"{self.file}: {self.name} is stored as {self.dtype}; weights may be"
                f" {', '.join(DTYPES)}, quantised ones are not read"
            )
        return DTYPES[self.dtype]

    def _read_run(self, file: int, start: int, out: AnyArray, stored: np.dtype[Any]) -> None:
        """Elements that follow each other in the file, the first at `start`."""
        target = out if out.dtype == stored else np.empty(len(out), stored)
        room = memoryview(target.view(np.uint8)).cast("B")
        done, offset = 0, self.offset + start * stored.itemsize
        while done < len(room):
            got = os.preadv(file, [room[done:]], offset + done)
            if not got:
                raise FolderError(f"{self.file} ends inside {self.name}; it was longer before")
            done += got
        if target is not out:
            with np.errstate(over="ignore"):  # to infinity, as casts do everywhere
                out[...] = target.astype(out.dtype)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, in the order of their bytes.

    Raises:
        FolderError: the file is missing, cut off or longer than its header says, or the header is
            broken.
        ImportError: safetensors is not installed.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(len(struct.pack("<Q", 0)))
            size = os.fstat(file.fileno()).st_size
            if is_lfs_pointer(beginning + file.read(64)):
                raise lfs_pointer(path)
            if len(beginning) < 8:
                raise FolderError(f"{path} is cut off: it has {size} bytes")
            (length,) = struct.unpack("<Q", beginning)
            if length > size - 8:
                raise FolderError(
                    f"{path} is cut off or no safetensors file: it has {size:,} bytes, its header"
                    f" alone would take {length:,}"
                )
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from None
    _check_length(path, header, has=size - 8 - length)
    _check_format(path)
    found = []
    for name, entry in json.loads(header).items():
        if name != "__metadata__":
            offset = 8 + length + entry["data_offsets"][0]
            found.append(StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), offset))
    return {tensor.name: tensor for tensor in sorted(found, key=lambda tensor: tensor.offset)}


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> AnyArray:
    """Memory that JAX takes on a CPU without a copy."""
    count = math.prod(shape) * dtype.itemsize
    memory = np.empty(count + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + count].view(dtype).reshape(shape)


def _check_length(path: Path, header: bytes, *, has: int) -> None:
    """In words of bytes, before the library says the same without them."""
    try:
        entries = [value for name, value in json.loads(header).items() if name != "__metadata__"]
        needs = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return
    if has != needs:
        what = "is cut off" if has < needs else "has bytes that no tensor owns"
        raise FolderError(f"{path} {what}: its tensors take {needs:,} bytes, it has {has:,}")


def _check_format(path: Path) -> None:
    try:
        import safetensors
    except ImportError:
        raise ImportError("a model's folder takes safetensors: pip install '.[models]'") from None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            file.keys()
    except safetensors.SafetensorError as error:
        reason = " ".join(str(error).split())
        raise FolderError(f"{path} has a broken header: {reason[:200]}") from None


def _runs(shape: tuple[int, ...], bounds: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Start and length, in elements, of what a slice takes from an array in C order."""
    last = len(shape)  # axes from here on are whole: they are one run
    while last and bounds[last - 1] == (0, shape[last - 1]):
        last -= 1
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    outer = max(last - 1, 0)
    count = math.prod(end - start for start, end in bounds[outer:])
    first = sum(start * stride for (start, _), stride in zip(bounds, strides, strict=True))
    for place in np.ndindex(*(end - start for start, end in bounds[:outer])):
        yield first + sum(i * stride for i, stride in zip(place, strides, strict=False)), count
