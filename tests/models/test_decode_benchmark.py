"""benchmarks/decode.py: what it counts, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
from flax import nnx

from benchmarks import decode
from models.decoder import Decoder, decoder_config


@pytest.mark.parametrize("name", decode.MODELS)
def test_weights_are_the_model_s(name: str) -> None:
    """The bytes of a step without a cache are those of all matrices; a norm is no matrix."""
    config = decoder_config(decode.MODELS[name])
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype="bfloat16"))
    leaves = jax.tree.leaves(nnx.state(model))
    matrices = sum(x.size for x in leaves if x.ndim == 2)
    assert decode.Work(config).step_bytes(1, 0) == 2 * matrices


def test_the_benchmark_runs_and_keeps_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "decode.json"
    sizes = ["--length", "20", "--tokens", "2", "--batch", "2", "--bandwidth", "0.01"]
    assert decode.main(["--model", "tiny", *sizes, "--out", str(out)]) == 0
    kept = json.loads(out.read_text())
    (result,) = kept["results"]
    assert result["batch"] == 2
    assert result["tokens_per_s"] == pytest.approx(2 / result["step_s"])
    assert {"date", "machine", "versions", "config"} <= kept.keys()
    assert "of the bandwidth bound" in capsys.readouterr().out
