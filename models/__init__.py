"""Flax NNX models whose attention is jattn's."""

from models.cache import KVCache
from models.decoder import Decoder, DecoderConfig
from models.folder import FolderError, from_pretrained, load_tokenizer, save_pretrained
from models.generation import Generated, TextStream, generate, stream
from models.transformer import Attention, Block, TransformerConfig, TransformerLM

__all__ = [
    "Attention",
    "Block",
    "Decoder",
    "DecoderConfig",
    "FolderError",
    "Generated",
    "KVCache",
    "TextStream",
    "TransformerConfig",
    "TransformerLM",
    "from_pretrained",
    "generate",
    "load_tokenizer",
    "save_pretrained",
    "stream",
]
