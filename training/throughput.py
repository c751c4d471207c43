"""How fast it goes: bytes or tokens a second, the share of the device's peak arithmetic (MFU).

Arithmetic as in PaLM (Chowdhery et al. 2022, appendix B): 6 per weight and token for the matrices,
12 per (query, key) pair, head and head dim for attention, recomputation not counted. PaLM counts
all T keys of each query, so do nanoGPT and others; here it is the pairs that a query sees, half of
them or fewer. An embedding multiplies nothing, an optimiser's products are none of the model's.
"""

import re

import jax
import numpy as np

from models import DecoderConfig, TransformerConfig
from models.transformer import VOCABULARY
from training.data import Batch

# Dense bfloat16 tensor-core peak in FLOP/s, from NVIDIA's data sheets; of several that a device
# kind may be, the first counts.
_BF16_PEAK = {
    "NVIDIA GB200": 2.5e15,
    "NVIDIA B200": 2.25e15,
    "NVIDIA GH200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA RTX A6000": 155e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}
_MEMORY_OR_SOCKET = r"([ -](SXM\d?|PCIe|PCIE|HBM\w+|\d+GB?))*"  # what may follow a name


class Pace:
    """Rates of single steps and of the steps since the last call of `take`."""

    def __init__(self, config: TransformerConfig | DecoderConfig, *, peak: float | None) -> None:
        self._config = config
        self._peak = peak
        self._compiled: set[tuple[int, ...]] = set()
        self._clear()

    def _clear(self) -> None:
        self._seconds = self._flops = 0.0
        self._tokens = 0

    def add(self, batch: Batch, seconds: float) -> dict[str, float]:
        """Rates of one step; none for the first of a shape, whose time is mostly compilation."""
        if batch.inputs.shape not in self._compiled:
            self._compiled.add(batch.inputs.shape)
            return {}
        flops = step_flops(self._config, batch)
        self._seconds += seconds
        self._tokens += batch.inputs.size
        self._flops += flops
        return self._rates(batch.inputs.size, flops, seconds)

    def take(self) -> dict[str, float]:
        """Rates of the steps since the last call, without what came between them."""
        rates = self._rates(self._tokens, self._flops, self._seconds) if self._tokens else {}
        self._clear()
        return rates

    def _rates(self, tokens: int, flops: float, seconds: float) -> dict[str, float]:
        rates = {"tokens_per_second": tokens / seconds}
        if self._peak is not None:
            rates["mfu"] = flops / seconds / self._peak
        return rates


def peak_flops(config: TransformerConfig, device: jax.Device) -> float | None:
    """Peak FLOP/s of the device in the model's dtype; None where the table has none."""
    if config.dtype == "float32":
        return None
    matches = (
        peak
        for kind, peak in _BF16_PEAK.items()
        if re.fullmatch(kind + _MEMORY_OR_SOCKET, device.device_kind)
    )
    return next(matches, None)


def step_flops(config: TransformerConfig | DecoderConfig, batch: Batch) -> float:
    """FLOPs of one update's forward and backward pass."""
    if isinstance(config, DecoderConfig):
        return _decoder_flops(config, batch)
    heads = config.num_heads * config.head_dim
    key_value_heads = config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (2 * heads + 2 * key_value_heads)
    mlp = 3 * config.hidden_size * config.mlp_size
    weights = config.num_layers * (attention + mlp) + VOCABULARY * config.hidden_size
    pairs = _visible_pairs(batch)
    return 6.0 * weights * batch.inputs.size + 12.0 * config.num_layers * heads * pairs


def _decoder_flops(config: DecoderConfig, batch: Batch) -> float:
    """The same of a decoder: its embedding multiplies nothing, and its windows count."""
    heads = config.num_attention_heads * config.head_dim
    key_value_heads = config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (2 * heads + 2 * key_value_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    weights = len(config.layers) * (attention + mlp) + config.vocab_size * config.hidden_size
    pairs = sum(_visible_pairs(batch, layer.window) for layer in config.layers)
    return 6.0 * weights * batch.inputs.size + 12.0 * heads * pairs


def _visible_pairs(batch: Batch, window: int | None = None) -> int:
    if batch.segment_ids is None:
        rows, length = batch.inputs.shape
        lengths = [length] * rows
    else:
        documents = [np.unique(row, return_counts=True)[1] for row in batch.segment_ids]
        lengths = [int(length) for row in documents for length in row]
    return sum(_causal_pairs(length, window) for length in lengths)


def _causal_pairs(length: int, window: int | None) -> int:
    seen = length if window is None else min(window, length)  # by the last query
    return seen * (seen + 1) // 2 + (length - seen) * seen
