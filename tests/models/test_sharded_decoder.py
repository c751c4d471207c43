"""A folder's model over four devices: logits, loss, gradients and tokens are the reference's."""

from __future__ import annotations

import pytest

from tests.cases import thorough
from tests.four_devices import run
from tests.models.reference import NAMES

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from models.folder.load import parameters
from models.generation import generate
from tests.models.reference import assert_norms, assert_right, expected, key_of, loaded

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

def rule(path, shape):
    # Megatron's cut, with each matrix's other axis over "data"; what two do not divide stays whole.
    if len(shape) == 1:
        axes = (None,)
    elif path.endswith(("o_proj.weight", "down_proj.weight")):
        axes = ("data", "model")
    else:
        axes = ("model", "data")
    return NamedSharding(mesh, P(*(a if n % 2 == 0 else None for a, n in zip(axes, shape))))

def check(name):
    model, theirs = loaded(name, sharding=rule), expected(name)
    cut = [x for _, x in parameters(model).items() if len(x.get_value().addressable_shards) == 4
           and x.get_value().addressable_shards[0].data.size * 4 == x.get_value().size]
    assert len(cut) >= 7 * len(model.layers), name
    tokens = jax.device_put(theirs["tokens"], NamedSharding(mesh, P("data")))
    graph, weights = nnx.split(model)

    def loss(weights, tokens):
        model = nnx.merge(graph, weights)
        return model.loss(tokens[:, :-1], tokens[:, 1:], chunk=7), model(tokens)

    (_, logits), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights, tokens)
    assert_right(name, "logits", logits)
    assert_norms(name, {key_of(path): float(jnp.linalg.norm(leaf[...].ravel()))
                        for path, leaf in nnx.to_flat_state(slopes)})

    rows, lengths = theirs["tokens"], theirs["prompts"]
    longest = max(lengths)
    mask = np.arange(longest)[None] >= longest - lengths[:, None]
    prompt = np.zeros((2, longest), np.int32)
    for row, length in enumerate(lengths):
        prompt[row, longest - length:] = rows[row, :length]
    found = generate(model, prompt, attention_mask=mask, max_new_tokens=32, stop=(),
                     prefill_chunk=16)
    np.testing.assert_array_equal(found, theirs["greedy"])

import warnings
warnings.filterwarnings("ignore", message="prompt and max_new_tokens come to")
with jax.default_matmul_precision("highest"):
    check({name!r})
"""
SEQUENCE = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from models.decoder.cross_entropy import mean_cross_entropy
from tests.models.test_decoder_loss import exact
from tests.tolerance import check_against_peer

mesh = jax.make_mesh((4,), ("sequence",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
x = rng.standard_normal((1, 64, 12)).astype(np.float32)
head = rng.standard_normal((50, 12)).astype(np.float32)
targets = rng.integers(-1, 50, (1, 64)).astype(np.int32)
slopes = jax.value_and_grad(lambda *a: mean_cross_entropy(*a, chunk=16), (0, 1))
alone = jax.jit(slopes)(x, head, targets)
right = exact(x, head, targets, None)
cut, whole = (NamedSharding(mesh, P(*axes)) for axes in ((None, "sequence"), ()))
slopes = jax.jit(slopes, out_shardings=(whole, (cut, whole)))
arguments = jax.device_put(x, cut), head, jax.device_put(targets, cut)
apart = slopes(*arguments)
for one, other, true in zip(*map(jax.tree.leaves, (apart, alone)), right):
    true = np.asarray(true)
    check_against_peer("gradient", one, other, true, np.abs(true), np.float32)
# Each device has a part of every chunk: no position of x goes to another.
text = slopes.lower(*arguments).compile().as_text()
assert "all-reduce" in text
for operation in ("all-gather", "all-to-all", "collective-permute"):
    assert operation not in text, operation
"""

_FIRST = ("llama-llama3",)


@pytest.mark.parametrize("name", [*_FIRST, *thorough(*((n,) for n in NAMES if n not in _FIRST))])
def test_four_devices_give_what_transformers_gives(name: str) -> None:
    run(PROGRAM.replace("{name!r}", repr(name)))


@pytest.mark.thorough
def test_loss_of_a_sequence_over_devices_moves_no_positions() -> None:
    run(SEQUENCE)
