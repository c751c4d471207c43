"""A decoder to a folder that Hugging Face loads."""

import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from models.decoder import Decoder
from models.folder.errors import FolderError, some
from models.folder.files import CONFIG, INDEX, SINGLE, local_folder
from models.folder.load import parameters
from models.folder.table import TABLE, Transform, keys_of
from models.folder.tensors import DTYPES

__all__ = ["save_pretrained"]

_GOES_ALONG = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_WRITTEN = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_CHUNK = 1 << 23  # bytes that are fetched from a device at once
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = {"format": "pt"}

type _Tensors = dict[str, tuple[jax.Array, Transform]]


def save_pretrained(
    model: Decoder,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    tokenizer: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that Hugging Face loads again, bit for bit.

    The folder appears whole or not at all: it is written beside its place and renamed into it.

    Args:
        model: its `config.json` is the one it was read from, with every field, but for the dtype.
        folder: must not exist, or be empty.
        max_shard_size: bytes of one safetensors file, a number or a text such as `"200MB"`; what
            takes more is cut into several, with an index. A single weight is never cut.
        tokenizer: a folder whose tokenizer's files and `generation_config.json` are copied.
        overwrite: replace the folder, if it is one that this function wrote.

    Raises:
        FolderError: the folder is there and holds something, or with `overwrite` something else
            than a saved model; or there is no tokenizer in that folder.
        ValueError: `max_shard_size` is no size, the model was not read from a config.json, or some
            of its weights are held by another process.
        OSError: it cannot be written; nothing is left of it.
    """
    final = Path(folder).expanduser().resolve()
    limit = _size(max_shard_size)
    config = _config_text(model)
    tensors = _tensors(model)
    companions = [] if tokenizer is None else _companions(local_folder(tokenizer))
    _check_free(final, overwrite=overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}-", suffix=".partial", dir=final.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        for companion in companions:
            shutil.copyfile(companion, partial / companion.name)
        _write_weights(partial, tensors, limit)
        (partial / CONFIG).write_text(config, encoding="utf-8")
        for file in partial.iterdir():
            _settle(file)
        _replace(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_free(final: Path, *, overwrite: bool) -> None:
    if not final.exists():
        return
    if not final.is_dir():
        raise FolderError(f"{final} is a file")
    there = [entry.name for entry in final.iterdir()]
    if not there:
        return
    if not overwrite:
        raise FolderError(
            f"{final} exists and holds {some(there)}; name another folder, or say overwrite=True"
        )
    own = {CONFIG, INDEX, *_GOES_ALONG}
    strange = [name for name in there if name not in own and not _WRITTEN.fullmatch(name)]
    if strange or CONFIG not in there:
        what = f"it holds {some(strange)}" if strange else f"it has no {CONFIG}"
        raise FolderError(f"{final} is not replaced: {what}, it is no saved model alone")


def _replace(partial: Path, final: Path) -> None:
    """The one for the other; the old one is gone only once the new one is in its place."""
    if not final.exists() or not any(final.iterdir()):
        partial.rename(final)
        return
    old = partial.with_suffix(".old")
    final.rename(old)
    try:
        partial.rename(final)
    except BaseException:
        old.rename(final)
        raise
    shutil.rmtree(old)


def _settle(file: Path) -> None:
    """On the disk before the name is: else a folder may look whole after a power cut."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _size(given: int | str) -> int:
    if isinstance(given, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)\s*", given.upper())
        size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    else:
        size = int(given)
    if size < 1:
        raise ValueError(
            f"max_shard_size must be bytes, or such as '5GB' or '200MB'; got {given!r}"
        )
    return size


def _config_text(model: Decoder) -> str:
    fields: dict[str, Any] = json.loads(model.config.source)
    if not fields:
        raise ValueError("the model's config was not read from a config.json, so there is none")
    for name in ("dtype", "torch_dtype"):
        if fields.get(name) is not None:
            fields[name] = np.dtype(next(iter(parameters(model).values())).dtype).name
    return json.dumps(fields, indent=2) + "\n"


def _companions(folder: Path) -> list[Path]:
    found = [folder / name for name in _GOES_ALONG if (folder / name).is_file()]
    if not any(file.name.startswith(("tokenizer.", "vocab.")) for file in found):
        raise FolderError(f"{folder} holds no tokenizer to copy")
    return found


def _tensors(model: Decoder) -> _Tensors:
    flat = parameters(model)
    keys = keys_of(TABLE, flat)
    for path, variable in flat.items():
        if not variable.get_value().is_fully_addressable:
            raise ValueError(f"{path} is held by other processes too: gather it first")
    return {keys[path][0]: (variable.get_value(), keys[path][1]) for path, variable in flat.items()}


def _write_weights(folder: Path, tensors: _Tensors, limit: int) -> None:
    shards = _shards(tensors, limit)
    if len(shards) == 1:
        _write(folder / SINGLE, shards[0])
        return
    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard)
        file_of |= dict.fromkeys(shard, name)
    total = sum(array.nbytes for array, _ in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: _Tensors, limit: int) -> list[_Tensors]:
    shards: list[_Tensors] = [{}]
    room = limit
    for key, (array, transform) in tensors.items():
        if array.nbytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][key] = (array, transform)
        room -= array.nbytes
    return shards


def _write(path: Path, tensors: _Tensors) -> None:
    """One safetensors file: the library's own writer wants all its tensors in host memory."""
    header = json.dumps(_header(tensors), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for array, transform in tensors.values():
            for part in _parts(array, transform):
                file.write(memoryview(part.reshape(-1).view(np.uint8)))


def _header(tensors: _Tensors) -> Mapping[str, Any]:
    header: dict[str, Any] = {"__metadata__": _METADATA}
    offset = 0
    for key, (array, transform) in tensors.items():
        header[key] = {
            "dtype": _NAMES[np.dtype(array.dtype)],
            "shape": list(transform.shape(array.shape)),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    return header


def _parts(array: jax.Array, transform: Transform) -> Iterator[NDArray[Any]]:
    """The tensor's values in the order of the file, a chunk at a time.

    What is fetched are slices of each device's part: an array, or a part of it, would keep the
    host's copy of what was once read from it.
    """
    axis = 0 if transform.axes is None else transform.axes[0]
    size = array.shape[axis]
    step = max(1, _CHUNK // max(1, math.ceil(array.nbytes / max(size, 1))))
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    for start in range(0, size, step):
        end = min(start + step, size)
        shape = (*array.shape[:axis], end - start, *array.shape[axis + 1 :])
        part = np.empty(shape, np.dtype(array.dtype))
        for shard in shards:
            first, last, _ = shard.index[axis].indices(size)
            low, high = max(first, start), min(last, end)
            if low < high:
                rows = jax.lax.dynamic_slice_in_dim(shard.data, low - first, high - low, axis)
                place = list(shard.index)
                place[axis] = slice(low - start, high - start)
                part[tuple(place)] = np.asarray(rows)
        yield np.ascontiguousarray(transform.array(part))
