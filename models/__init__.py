"""Flax NNX models whose attention is jattn's."""

from models.transformer import Attention, Block, TransformerConfig, TransformerLM

__all__ = ["Attention", "Block", "TransformerConfig", "TransformerLM"]
