"""All tensors of a folder, whether its weights are one file or several with an index."""

from pathlib import Path, PurePosixPath
from typing import Any

from models.folder.errors import FolderError, some
from models.folder.files import INDEX, SINGLE, read_json
from models.folder.tensors import StoredTensor, read_header

__all__ = ["stored_tensors"]

# What else holds weights; none of it is read, but it says why nothing was found.
_OTHER_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors by name, file by file in the order of their bytes.

    `model.safetensors` comes before an index, as in Transformers.

    Raises:
        FolderError: there are no weights, a file is missing or broken, or index and files disagree.
    """
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise _no_weights(folder)
    path = folder / INDEX
    file_of = _weight_map(path)
    found: dict[str, StoredTensor] = {}
    unlisted: list[str] = []
    for file in dict.fromkeys(file_of.values()):
        if not (folder / file).exists():
            raise FolderError(f"{path} names {file}, which is missing")
        tensors = read_header(folder / file)
        lacking = [name for name, of in file_of.items() if of == file and name not in tensors]
        if lacking:
            raise FolderError(f"{path} places {some(lacking)} in {file}, which does not hold it")
        unlisted += [f"{name} of {file}" for name in tensors if name not in file_of]
        found |= {name: tensor for name, tensor in tensors.items() if file_of.get(name) == file}
    if unlisted:
        raise FolderError(f"{path} has no entry for {some(unlisted)}")
    return found


def _weight_map(path: Path) -> dict[str, str]:
    found: Any = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise FolderError(f"{path} has no weight_map that says which file holds which tensor")
    for name, file in found.items():
        plain = isinstance(file, str) and file == PurePosixPath(file).name and "\\" not in file
        if not plain or not file.endswith(".safetensors"):
            raise FolderError(
                f"{path} places {name} in {file!r}, no safetensors file of its folder"
            )
    return found


def _no_weights(folder: Path) -> FolderError:
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(_OTHER_WEIGHTS)]
    shards = [name for name in names if name.startswith("model-") and name.endswith(".safetensors")]
    if shards:
        return FolderError(f"{folder / INDEX} is missing, which says what {some(shards)} hold")
    if names:
        return FolderError(
            f"{folder} holds its weights in {some(names)}; only {SINGLE}, or the files of {INDEX},"
            " are read: save it again with Transformers' save_pretrained"
        )
    return FolderError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}")
