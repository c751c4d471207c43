"""A decoder from a folder that Hugging Face wrote."""

import dataclasses
import fnmatch
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.decoder import Decoder, DecoderConfig, decoder_config
from models.folder.errors import FolderError, some
from models.folder.files import CONFIG, local_folder, read_json
from models.folder.placing import Placement, place, sharding_of
from models.folder.table import IGNORED, TABLE, Row, Transform, keys_of
from models.folder.tensors import StoredTensor
from models.folder.weights import stored_tensors
from models.implementations import AttnImplementation
from models.rematerialisation import Rematerialize

__all__ = ["from_pretrained", "parameters", "read_config"]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED = 1 << 22  # elements compared at once


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    attn_implementation: AttnImplementation = "sdpa",
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    sharding: Placement = None,
    rematerialize: Rematerialize = "nothing",
) -> Decoder:
    """The model of a local folder in Hugging Face's format, its weights on their devices.

    Weights are read one at a time, cast as they come, each device's slice straight to that device:
    the host holds no second copy of the model, on a CPU not even of one weight.

    Args:
        folder: holds `config.json` and `model.safetensors`, or `model.safetensors.index.json` and
            the files it names. Names of models on a hub are not looked up.
        attn_implementation: attention by name: `"eager"`, `"sdpa"` (jattn picks), `"flash"` or
            `"flash_attention_2"`, `"memory_efficient"`.
        dtype: of activations and products: float32, bfloat16 or float16. None takes config.json's,
            or where it has none the stored weights'.
        param_dtype: of the weights; None for `dtype`.
        sharding: a `jax.sharding.Sharding` for all weights, or a function of a weight's path
            (`"layers.0.self_attn.q_proj.weight"`) and shape, matrices being (outputs, inputs), that
            returns one. None puts all on the default device. To compute with a model on a mesh,
            the mesh's axes have to be `jax.sharding.AxisType.Auto`.
        rematerialize: what backward computes again: `"nothing"`, `"elementwise"`, `"block"` or
            `"everything"`, see `models.rematerialisation`.

    Returns:
        A `Decoder`: int32 tokens (B, T) to float32 logits (B, T, vocabulary).

    Raises:
        FolderError: the folder, one of its files, or how they fit together; a ValueError whose one
            line names the file and the tensor.
        ValueError: an argument that is none of those above.
        ImportError: safetensors is not installed.
    """
    path = local_folder(folder)
    config = read_config(path)
    stored = stored_tensors(path)
    config, stored = _tied(config, stored)
    dtype = _dtype(config, stored) if dtype is None else dtype

    def fresh() -> Decoder:
        return Decoder(
            config,
            rngs=nnx.Rngs(0),
            attn_implementation=attn_implementation,
            dtype=dtype,
            param_dtype=param_dtype,
            rematerialize=rematerialize,
        )

    model = nnx.eval_shape(fresh)
    fill(model, stored, path, sharding)
    return model


def read_config(folder: str | os.PathLike[str]) -> DecoderConfig:
    """What the folder's config.json describes.

    Raises:
        FolderError: it is missing, broken, or describes what is not implemented; the text names
            the field.
    """
    path = local_folder(folder) / CONFIG
    fields = read_json(path)
    try:
        return decoder_config(fields)
    except ValueError as error:
        raise FolderError(f"{path}: {error}") from None


def parameters(model: Decoder) -> dict[str, Any]:
    """The model's parameters, by their paths in its order: variables whose value can be set."""
    _, state = nnx.split(model)
    return {".".join(map(str, names)): variable for names, variable in nnx.to_flat_state(state)}


def fill(
    model: Decoder,
    stored: Mapping[str, StoredTensor],
    folder: Path,
    sharding: Placement,
    table: Sequence[Row] = TABLE,
) -> None:
    """Gives an abstract model its weights, file by file in the order of their bytes.

    Raises:
        FolderError: weights are missing, unexpected, misshapen or of a dtype that is not read.
    """
    flat = parameters(model)
    keys = keys_of(table, flat)
    _check_fit(folder, {path: variable.shape for path, variable in flat.items()}, keys, stored)
    shardings = {path: sharding_of(sharding, path, flat[path].shape) for path in flat}
    path_of = {key: path for path, (key, _) in keys.items()}
    for key, tensor in stored.items():
        path = path_of.get(key)
        if path is None:
            continue
        dtype = np.dtype(flat[path].dtype)
        flat[path].set_value(place(tensor, keys[path][1], dtype, shardings[path]))
    state: Any = {tuple(_names(path)): variable for path, variable in flat.items()}
    nnx.update(model, nnx.from_flat_state(state))


def _names(path: str) -> list[str | int]:
    return [int(name) if name.isdecimal() else name for name in path.split(".")]


def _check_fit(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    keys: Mapping[str, tuple[str, Transform]],
    stored: Mapping[str, StoredTensor],
) -> None:
    wanted = {keys[path][0]: keys[path][1].shape(shape) for path, shape in shapes.items()}
    missing = [key for key in wanted if key not in stored]
    unexpected = [
        key
        for key in stored
        if key not in wanted and not any(fnmatch.fnmatchcase(key, name) for name in IGNORED)
    ]
    misshapen = [
        f"{key} is {stored[key].shape}, not {shape}"
        for key, shape in wanted.items()
        if key in stored and stored[key].shape != shape
    ]
    faults = [
        f"{what}: {some(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if faults:
        raise FolderError(
            f"the weights in {folder} are not those of its {CONFIG}; {'; '.join(faults)}"
        )
    for key in wanted:
        _ = stored[key].stored_dtype


def _tied(
    config: DecoderConfig, stored: dict[str, StoredTensor]
) -> tuple[DecoderConfig, dict[str, StoredTensor]]:
    """As Transformers does: of two that are tied one is enough; two that differ are not tied."""
    if not config.tie_word_embeddings or _HEAD not in stored:
        return config, stored
    head = stored[_HEAD]
    if _EMBEDDING not in stored:
        only = {_EMBEDDING if name == _HEAD else name: tensor for name, tensor in stored.items()}
        return config, only
    if _equal(stored[_EMBEDDING], head):
        return config, {name: tensor for name, tensor in stored.items() if name != _HEAD}
    warnings.warn(
        f"{CONFIG} ties {_HEAD} to {_EMBEDDING}, but {head.file.parent} holds both and they differ:"
        " they are not tied",
        stacklevel=3,
    )
    return dataclasses.replace(config, tie_word_embeddings=False), stored


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    if a.shape != b.shape or len(a.shape) != 2:
        return False
    rows, columns = a.shape
    step = max(1, _COMPARED // max(columns, 1))
    wide = np.dtype(np.float64 if "F64" in (a.dtype, b.dtype) else np.float32)
    for start in range(0, rows, step):
        part = (slice(start, min(start + step, rows)), slice(0, columns))
        if not np.array_equal(a.read(part, wide), b.read(part, wide)):
            return False
    return True


def _dtype(config: DecoderConfig, stored: Mapping[str, StoredTensor]) -> DTypeLike:
    if config.dtype is not None:
        return config.dtype
    for tensor in stored.values():
        if jnp.issubdtype(tensor.stored_dtype, jnp.floating):
            found = jnp.dtype(tensor.stored_dtype)
            return found if found.itemsize <= 4 else jnp.dtype(jnp.float32)
    return "float32"
