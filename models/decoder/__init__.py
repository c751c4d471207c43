"""Decoders that Hugging Face's config.json describes, in Flax NNX with jattn's attention."""

from models.decoder.config import DecoderConfig, Layer
from models.decoder.families import FAMILIES, decoder_config
from models.decoder.model import Block, Decoder

__all__ = ["FAMILIES", "Block", "Decoder", "DecoderConfig", "Layer", "decoder_config"]
