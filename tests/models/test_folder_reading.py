"""Weights of a folder: every parameter holds the tensor of its name, cast, wherever it is put."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import models
from models.decoder import Decoder, decoder_config
from models.folder import load
from models.folder.table import TABLE, TRANSPOSED, Row
from models.folder.tensors import StoredTensor, read_header
from tests.four_devices import run
from tests.models.folders import BFLOAT16, LLAMA, SHAPES, drawn, read, write


def held(model: Decoder) -> dict[str, Any]:
    """Parameters by the names that Hugging Face gives them."""
    return {
        path if path.startswith("lm_head") else f"model.{path}": variable.get_value()
        for path, variable in load.parameters(model).items()
    }


def assert_holds(model: Decoder, tensors: dict[str, Any], dtype: Any) -> None:
    parameters = held(model)
    assert parameters.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert parameters[name].dtype == dtype, name
        np.testing.assert_array_equal(np.asarray(parameters[name]), tensor.astype(dtype), name)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("stored", [BFLOAT16, np.float32, np.float16, np.float64])
def test_parameters_are_the_tensors_of_their_names(tmp_path: Path, stored: Any, files: int) -> None:
    tensors = drawn(stored)
    write(tmp_path, LLAMA, tensors, files=files)
    for dtype in ("float32", "bfloat16"):
        assert_holds(models.from_pretrained(tmp_path, dtype=dtype), tensors, jnp.dtype(dtype))


def test_model_computes_with_what_was_read(tmp_path: Path) -> None:
    """Other weights make other logits: none of them are fresh ones."""
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    logits = []
    for seed in (0, 1, 0):
        write(tmp_path, LLAMA, drawn(seed=seed))
        logits.append(np.asarray(models.from_pretrained(tmp_path, dtype="float32")(tokens)))
    assert logits[0].shape == (1, 6, 40)
    assert logits[0].dtype == np.float32
    np.testing.assert_array_equal(logits[0], logits[2])
    assert not np.allclose(logits[0], logits[1])


@pytest.mark.parametrize(
    ("named", "stored", "expected"),
    [
        ("bfloat16", np.float32, "bfloat16"),
        ("float16", np.float32, "float16"),
        (None, BFLOAT16, "bfloat16"),
        (None, np.float64, "float32"),
    ],
)
def test_dtype_is_that_of_config_else_that_of_weights(
    tmp_path: Path, named: str | None, stored: Any, expected: str
) -> None:
    write(tmp_path, LLAMA | {"torch_dtype": named}, drawn(stored))
    model = models.from_pretrained(tmp_path)
    assert model.dtype == jnp.dtype(expected)
    assert_holds(model, drawn(stored), jnp.dtype(expected))


def test_weights_may_be_wider_than_the_computation(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, drawn())
    model = models.from_pretrained(tmp_path, dtype="bfloat16", param_dtype="float32")
    assert model.dtype == jnp.bfloat16
    assert_holds(model, drawn(), jnp.float32)


def test_values_past_the_range_become_infinite(tmp_path: Path) -> None:
    tensors = drawn(np.float32)
    tensors["model.norm.weight"][3] = 1e30
    write(tmp_path, LLAMA, tensors)
    norm = models.from_pretrained(tmp_path, dtype="float16").norm.weight[...]
    assert np.isposinf(norm[3])
    assert np.isfinite(np.delete(np.asarray(norm), 3)).all()


def test_untied_head_that_is_tied_by_config(tmp_path: Path) -> None:
    """As Transformers: equal or alone it is the embedding, and else it is the output layer."""
    tied, tensors = LLAMA | {"tie_word_embeddings": True}, drawn()
    embedding = tensors["model.embed_tokens.weight"]
    without = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    write(tmp_path / "absent", tied, without)
    write(tmp_path / "equal", tied, without | {"lm_head.weight": embedding})
    alone = {n: t for n, t in without.items() if n != "model.embed_tokens.weight"}
    write(tmp_path / "alone", tied, alone | {"lm_head.weight": embedding})
    write(tmp_path / "wider", tied, without | {"lm_head.weight": embedding.astype(np.float32)})
    for name in ("absent", "equal", "alone", "wider"):
        model = models.from_pretrained(tmp_path / name)
        assert model.lm_head is None
        assert_holds(model, without, jnp.bfloat16)

    write(tmp_path / "differs", tied, tensors)
    with pytest.warns(UserWarning, match=r"lm_head\.weight .* differ: they are not tied"):
        model = models.from_pretrained(tmp_path / "differs")
    assert_holds(model, tensors, jnp.bfloat16)


def test_buffers_of_old_folders_are_left_out(tmp_path: Path) -> None:
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        "model.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    write(tmp_path, LLAMA, drawn() | old)
    assert_holds(models.from_pretrained(tmp_path), drawn(), jnp.bfloat16)


def test_single_file_comes_before_an_index(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, drawn(seed=1), files=2)
    write(tmp_path, LLAMA, drawn(seed=0))
    assert_holds(models.from_pretrained(tmp_path), drawn(seed=0), jnp.bfloat16)


def test_any_slice_of_a_tensor(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    arrays = {
        "four": rng.standard_normal((3, 4, 5, 6)).astype(np.float32),
        "scalar": np.array(2, np.float32),
        "none": np.zeros((4, 0), np.float32),
        "half": rng.standard_normal((7, 9)).astype(BFLOAT16),
    }
    write(tmp_path, LLAMA, arrays)
    stored = read_header(tmp_path / "model.safetensors")
    for name, array in arrays.items():
        for _ in range(30):
            ends = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in array.shape]
            index = tuple(slice(*pair) if rng.random() < 0.7 else slice(None) for pair in ends)
            for dtype in (array.dtype, np.dtype(np.float32), BFLOAT16):
                part = stored[name].read(index, dtype)
                np.testing.assert_array_equal(part, array[index].astype(dtype))


def test_long_runs_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.folder.tensors._CHUNK", 7)
    write(tmp_path, LLAMA, drawn())
    assert_holds(models.from_pretrained(tmp_path, dtype="float32"), drawn(), jnp.float32)


def test_table_may_transpose(tmp_path: Path) -> None:
    """A folder that keeps a matrix as (inputs, outputs), as GPT-2's do."""
    tensors = drawn()
    name = "model.layers.1.mlp.up_proj.weight"
    kept = tensors | {
        key: tensor.T.copy() for key, tensor in tensors.items() if "mlp.up_proj" in key
    }
    write(tmp_path, LLAMA, kept)
    table = [
        Row(row.key, row.path, TRANSPOSED) if row.path.endswith("up_proj.weight") else row
        for row in TABLE
    ]
    config = decoder_config(LLAMA)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype="bfloat16"))
    everywhere = NamedSharding(jax.make_mesh((1,), ("model",)), PartitionSpec("model"))
    load.fill(model, load.stored_tensors(tmp_path), tmp_path, everywhere, table)
    assert kept[name].shape != tensors[name].shape
    assert_holds(model, tensors, jnp.bfloat16)


def test_sharding_is_asked_for_each_parameter(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, drawn())
    asked = {}
    device = SingleDeviceSharding(jax.devices()[0])

    def rule(path: str, shape: tuple[int, ...]) -> SingleDeviceSharding:
        asked[path] = shape
        return device

    models.from_pretrained(tmp_path, sharding=rule)
    keys = {f"model.{path}".replace("model.lm_head", "lm_head"): path for path in asked}
    assert {key: asked[path] for key, path in keys.items()} == SHAPES


def test_sharding_that_is_none(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, drawn())
    with pytest.raises(TypeError, match=r"sharding must be .* for embed_tokens.weight it is 'cpu'"):
        models.from_pretrained(tmp_path, sharding=lambda path, shape: "cpu")
    with pytest.raises(TypeError, match="it is 7"):
        models.from_pretrained(tmp_path, sharding=7)


def test_each_device_gets_its_slice(tmp_path: Path) -> None:
    write(tmp_path / "folder", LLAMA, drawn(), files=2)
    np.savez(tmp_path / "expected.npz", **{n: t.astype(np.float32) for n, t in drawn().items()})
    run(f"""
import jax, numpy as np, models
from jax.sharding import NamedSharding, PartitionSpec as P
from models.folder.load import parameters
mesh = jax.make_mesh((2, 2), ("data", "model"))
expected = np.load({str(tmp_path / "expected.npz")!r})

def rule(path, shape):
    columns = path.endswith(("o_proj.weight", "down_proj.weight"))
    return NamedSharding(mesh, P() if len(shape) == 1 else P(None, "model") if columns
                         else P("model", "data"))

model = models.from_pretrained({str(tmp_path / "folder")!r}, dtype="float32", sharding=rule)
for path, variable in parameters(model).items():
    array = variable.get_value()
    assert array.sharding == rule(path, array.shape), path
    assert len(array.addressable_shards) == 4
    key = path if path.startswith("lm_head") else "model." + path
    np.testing.assert_array_equal(np.asarray(array), expected[key])
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[key][shard.index])
model = models.from_pretrained({str(tmp_path / "folder")!r}, sharding=rule)
models.save_pretrained(model, {str(tmp_path / "back")!r})
try:
    models.from_pretrained({str(tmp_path / "folder")!r}, sharding=NamedSharding(mesh,
        P(None, "model")))
except ValueError as error:
    assert "does not fit layers.0.input_layernorm.weight, (16,): " in str(error), error
else:
    raise AssertionError
third = NamedSharding(jax.make_mesh((3,), ("x",), devices=jax.devices()[:3]), P("x"))
try:
    models.from_pretrained({str(tmp_path / "folder")!r}, sharding=third)
except ValueError as error:
    assert "does not fit embed_tokens.weight, (40, 16): " in str(error), error
else:
    raise AssertionError
""")
    back = models.from_pretrained(tmp_path / "back", dtype="float32")
    assert_holds(back, drawn(), jnp.float32)
    assert read(tmp_path / "back").keys() == SHAPES.keys()
    for name, tensor in read(tmp_path / "back").items():
        np.testing.assert_array_equal(tensor.reshape(SHAPES[name]), drawn()[name].view(np.uint16))


def test_header_keeps_what_the_file_says(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, drawn())
    found = read_header(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == SHAPES
    content = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for name, tensor in found.items():
        assert isinstance(tensor, StoredTensor)
        start, end = header[name]["data_offsets"]
        data = content[tensor.offset : tensor.offset + end - start]
        assert data == drawn()[name].tobytes()
