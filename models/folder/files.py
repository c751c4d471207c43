"""The files of a folder: where it is, its JSON, and what stands there instead of what should."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from models.folder.errors import FolderError, some

__all__ = ["CONFIG", "INDEX", "SINGLE", "local_folder", "read_json"]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LFS_POINTER = b"version https://git-lfs"
_JSON_AT_MOST = 64 << 20  # bytes; an index of a thousand layers takes a few


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, which has to be there.

    Raises:
        FolderError: it is not, or it is a file.
    """
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FolderError(f"{path} is a file; name the folder that holds {CONFIG} and the weights")
    named = str(folder)
    if named.count("/") <= 1 and not named.startswith((".", "/", "~")):
        raise FolderError(
            f"{named!r} is no folder here; a model on a hub is not fetched: download it first, and"
            " name the folder"
        )
    raise FolderError(f"{path} does not exist")


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        FolderError: no such file, or it is not one JSON object.
    """
    try:
        if path.stat().st_size > _JSON_AT_MOST:
            raise FolderError(f"{path} is too large to be JSON of a model ({_JSON_AT_MOST} bytes)")
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    if content.startswith(_LFS_POINTER):
        raise lfs_pointer(path)
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_no_twins)
    except UnicodeDecodeError as error:
        raise FolderError(f"{path} is not JSON: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise FolderError(
            f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path} is not JSON of a model: {error}") from None
    if not isinstance(values, dict):
        raise FolderError(f"{path} must be a JSON object, is {type(values).__name__}")
    return values


def unreadable(path: Path, error: OSError) -> FolderError:
    """Why a file that should be there cannot be read, and what there is in its place."""
    if error.errno != errno.ENOENT or path.is_symlink():
        return FolderError(f"{path} cannot be read: {error.strerror}")
    try:
        there = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        there = []
    return FolderError(f"{path} is missing; the folder holds {some(there) or 'nothing'}")


def lfs_pointer(path: Path) -> FolderError:
    """A file that stands for another."""
    return FolderError(f"{path} is a pointer of Git LFS; the file itself was not downloaded")


def is_lfs_pointer(beginning: bytes) -> bool:
    """Whether a file that begins so stands for another."""
    return beginning.startswith(_LFS_POINTER)


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return values
