"""Generation beside what the chip allows: MFU of a long prefill, tokens/s of decoding after it.

    python benchmarks/decode.py                          on a GPU: 1B, 32,768 tokens, 1 and 16 rows
    python benchmarks/decode.py --model tiny --length 256 --batch 1 4 --tokens 8

The models are random and bfloat16, in the shape of real ones (config.json's fields are below). Both
times are of `models.stream`, as a user sees them: to the first token, and from the eighth token to
the last, host included. The bound of decoding is the bytes that a step has to read, weights and
cache, over the rate at which this device copies (reading alone may be faster: a share above 100% is
no mistake); that of prefill is the rate that --tflops names.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.attention import machine
from benchmarks.jax_calls import facts
from models.cache import KVCache
from models.decoder import Decoder, DecoderConfig, decoder_config
from models.generation import stream

WARM = 8  # tokens before the clock starts: steps that were given out during prefill among them
H100_TFLOPS = 989.0  # bfloat16, dense, NVIDIA H100 SXM data sheet

MODELS: dict[str, dict[str, Any]] = {
    # Llama 3.2 1B's config.json.
    "1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16,
        "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2,
        "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a model asks of a chip, by its shape."""

    config: DecoderConfig

    def prefill_flops(self, tokens: int) -> float:
        """Of one row: 2 a weight and token, and causal attention's half of T²; head left out."""
        config = self.config
        heads = config.num_attention_heads * config.head_dim
        pairs = tokens * (tokens + 1) / 2
        return 2.0 * self.block_weights() * tokens + len(config.layers) * 4 * heads * pairs

    def block_weights(self) -> int:
        """Elements of the blocks' matrices."""
        config = self.config
        heads = config.num_attention_heads + config.num_key_value_heads
        attention = 2 * config.hidden_size * heads * config.head_dim
        return len(config.layers) * (attention + 3 * config.hidden_size * config.intermediate_size)

    def step_bytes(self, batch: int, length: int) -> int:
        """What a step reads: bfloat16 matrices, the output layer's too, and keys and values."""
        config = self.config
        head = config.vocab_size * config.hidden_size
        cache = 2 * len(config.layers) * config.num_key_value_heads * config.head_dim
        return 2 * (self.block_weights() + head + batch * length * cache)


@dataclass(frozen=True)
class Result:
    """One batch; rates in tokens/s and bytes/s, times in seconds."""

    batch: int
    length: int
    prefill_s: float
    prefill_mfu: float
    step_s: float
    tokens_per_s: float
    bound_tokens_per_s: float
    share_of_bound: float
    cache_bytes: int


def random_model(config: DecoderConfig) -> Decoder:
    """Weights on the device, made there."""
    return nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype="bfloat16"))()


def copy_rate(count: int = 1 << 28, calls: int = 20) -> float:
    """Bytes read and written a second, copying `count` bfloat16 numbers, the best of a few."""
    copy = jax.jit(lambda x: x + 1)
    x = jax.block_until_ready(copy(jnp.zeros(count, jnp.bfloat16)))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(calls):
            x = copy(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - began) / calls)
    return float(2 * x.nbytes / min(times))


def measure(
    model: Decoder, batch: int, length: int, tokens: int, *, bandwidth: float, tflops: float
) -> Result:
    """One run that compiles, then the one that counts."""
    work = Work(model.config)
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, length))
    prefill_s = step_s = 0.0
    for _ in range(2):
        began = time.perf_counter()
        generated = stream(model, prompt, max_new_tokens=WARM + tokens, stop=())
        next(generated)
        first = time.perf_counter()
        for _ in range(WARM - 1):
            next(generated)
        warm = time.perf_counter()
        for _ in range(tokens):
            next(generated)
        prefill_s, step_s = first - began, (time.perf_counter() - warm) / tokens
    bound = bandwidth / work.step_bytes(batch, length)  # steps a second
    cache = jax.eval_shape(
        lambda: KVCache.empty(
            model.config, batch=batch, capacity=length + WARM + tokens, dtype=model.dtype
        )
    )
    return Result(
        batch=batch,
        length=length,
        prefill_s=prefill_s,
        prefill_mfu=batch * work.prefill_flops(length) / prefill_s / (tflops * 1e12),
        step_s=step_s,
        tokens_per_s=batch / step_s,
        bound_tokens_per_s=batch * bound,
        share_of_bound=1 / step_s / bound,
        cache_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*MODELS], default="1b" if on_gpu else "tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--length", type=int, default=32768 if on_gpu else 256)
    parser.add_argument("--tokens", type=int, default=128 if on_gpu else 8, help="timed steps")
    parser.add_argument("--tflops", type=float, default=H100_TFLOPS, help="of the chip, for MFU")
    parser.add_argument("--bandwidth", type=float, help="TB/s (default: that of a copy, measured)")
    parser.add_argument("--out", type=Path, help="result file (default: printed alone)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, keeps."""
    asked = parse(arguments)
    rate = copy_rate() if asked.bandwidth is None else asked.bandwidth * 1e12
    found = facts()
    model = random_model(decoder_config(MODELS[asked.model]))
    results = []
    for batch in asked.batch:
        result = measure(
            model, batch, asked.length, asked.tokens, bandwidth=rate, tflops=asked.tflops
        )
        print(
            f"B {batch}, T {asked.length}: prefill {result.prefill_s:.3f} s, MFU"
            f" {result.prefill_mfu:.1%}; {result.tokens_per_s:.1f} tokens/s,"
            f" {result.share_of_bound:.1%} of the bandwidth bound",
            flush=True,
        )
        results.append(asdict(result))
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(dict(found)),
        "versions": {"python": sys.version.split()[0], **found["versions"]},
        "model": asked.model,
        "config": MODELS[asked.model],
        "tflops": asked.tflops,
        "copy_bytes_per_s": rate,
        "results": results,
    }
    if asked.out is not None:
        asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
