"""The model of a folder in Hugging Face's format: read to be trained on, and saved."""

import functools
import json
from pathlib import Path
from typing import Any

from flax import nnx

from models import Decoder, DecoderConfig, from_pretrained, save_pretrained
from models.folder import read_config
from training.config import TrainConfig
from training.errors import TrainingError

APPLY_TO_FOLDERS = frozenset({"attn_implementation", "rematerialize", "dtype", "param_dtype"})
"""The options of a new model that a folder's takes too."""


def decoder_config_of(config: TrainConfig) -> DecoderConfig:
    """What the folder's config.json describes.

    Raises:
        models.FolderError: it cannot be read.
    """
    return _read(_folder(config))


def abstract_model(config: TrainConfig) -> Decoder:
    """The folder's model without its weights."""
    decoder = decoder_config_of(config)
    model: Decoder = nnx.eval_shape(lambda: Decoder(decoder, rngs=nnx.Rngs(0), **_options(config)))
    return model


def load(config: TrainConfig) -> Decoder:
    """The folder's model.

    Raises:
        models.FolderError: it cannot be read.
        TrainingError: its output layer and embedding are tied and yet differ.
    """
    model = from_pretrained(_folder(config), **_options(config))
    if model.config != decoder_config_of(config):
        raise TrainingError(
            f"{_folder(config)} holds an output layer unlike the embedding it is tied to;"
            " set tie_word_embeddings to false in its config.json"
        )
    return model


def save(folder: Path, graph: Any, params: Any, config: TrainConfig) -> None:
    """Writes the trained model, with the tokenizer it came with; replaces one saved before."""
    model: Decoder = nnx.merge(graph, params)
    save_pretrained(model, folder, tokenizer=_folder(config), overwrite=True)


def facts(config: TrainConfig) -> dict[str, Any]:
    """What the run's config.json keeps of the model, which no option describes."""
    found: dict[str, Any] = json.loads(decoder_config_of(config).source)
    return found


def _folder(config: TrainConfig) -> str:
    assert config.fine_tune.model is not None
    return config.fine_tune.model


@functools.cache
def _read(folder: str) -> DecoderConfig:
    return read_config(folder)


def _options(config: TrainConfig) -> dict[str, Any]:
    return {name: getattr(config.model, name) for name in sorted(APPLY_TO_FOLDERS)}
