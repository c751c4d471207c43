"""Flax NNX models whose attention is jattn's."""

from models.decoder import Decoder, DecoderConfig
from models.folder import FolderError, from_pretrained, load_tokenizer, save_pretrained
from models.transformer import Attention, Block, TransformerConfig, TransformerLM

__all__ = [
    "Attention",
    "Block",
    "Decoder",
    "DecoderConfig",
    "FolderError",
    "TransformerConfig",
    "TransformerLM",
    "from_pretrained",
    "load_tokenizer",
    "save_pretrained",
]
