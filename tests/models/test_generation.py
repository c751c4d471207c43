"""`generate`: the tokens that a forward without a cache gives, row by row, compiled once."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.decoder import Decoder, decoder_config
from models.generation import Generated, generate, stream
from models.generation.sampling import Chance, Draw, choose
from tests.backends import quick_jit

VOCABULARY, NEW = 96, 12
FIELDS: dict[str, Any] = {
    "model_type": "gemma2", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "sliding_window": 6, "query_pre_attn_scalar": 8, "max_position_embeddings": 64,
    "eos_token_id": [5, 7], "pad_token_id": None,
}  # fmt: skip
CONFIG = decoder_config(FIELDS)
LENGTHS = (23, 9, 1)
_rng = np.random.default_rng(0)
TOKENS = _rng.integers(0, VOCABULARY, (len(LENGTHS), max(LENGTHS)))
SAMPLING: dict[str, Any] = dict(max_new_tokens=NEW, temperature=0.9, top_p=0.95, prefill_chunk=16)
MASK = np.arange(max(LENGTHS))[None] >= max(LENGTHS) - np.array(LENGTHS)[:, None]


@pytest.fixture(scope="module")
def model() -> Decoder:
    """Random weights, large enough that the likeliest token changes."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0), attn_implementation="eager")
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda x: 12 * x if x.ndim == 2 else x, state)
    merged: Decoder = nnx.merge(graph, state)
    return merged


def likeliest(model: Decoder, rows: np.ndarray) -> np.ndarray:
    """What follows each prefix of rows that begin with their first token, without a cache."""
    return np.asarray(quick_jit(lambda tokens: model(tokens).argmax(-1))(jnp.asarray(rows)))


def test_greedy_tokens_are_those_of_a_forward_without_a_cache(model: Decoder) -> None:
    found = [
        np.asarray(
            generate(model, TOKENS, attention_mask=MASK, max_new_tokens=NEW, stop=(), **options)
        )
        for options in ({"prefill_chunk": 7}, {"prefill_chunk": 16})
    ]
    assert found[0].shape == (3, NEW)
    assert found[0].dtype == np.int32
    whole = np.zeros((3, max(LENGTHS) + NEW), np.int32)
    for row, length in enumerate(LENGTHS):
        whole[row, : length + NEW] = [*TOKENS[row, -length:], *found[0][row]]
    expected = likeliest(model, whole)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(expected[row, length - 1 :][:NEW], found[0][row])
    assert len(np.unique(found[0])) >= 4
    np.testing.assert_array_equal(found[0], found[1])


def test_a_row_samples_the_same_alone_and_beside_others(model: Decoder) -> None:
    sampling: dict[str, Any] = SAMPLING | {"stop": ()}
    seeds = [4, 8, 15]
    together = generate(model, TOKENS, attention_mask=MASK, seed=seeds, **sampling)
    for row, length in enumerate(LENGTHS):
        alone = generate(model, TOKENS[row : row + 1, -length:], seed=seeds[row], **sampling)
        np.testing.assert_array_equal(alone[0], together[row])
    shared = [
        generate(model, np.repeat(TOKENS[:1], 3, 0), seed=seed, **sampling) for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(shared[0], shared[1])
    assert len({tuple(row.tolist()) for row in (*shared[0], *shared[2])}) == 6


def test_a_row_that_ended_is_filled_while_others_go_on(model: Decoder) -> None:
    free = np.asarray(
        generate(model, TOKENS, attention_mask=MASK, max_new_tokens=NEW, prefill_chunk=16, stop=())
    )
    last, pair = int(free[0, 2]), free[1, 4:6].tolist()
    seen: list[Generated] = []
    found = np.asarray(
        generate(
            model, TOKENS, attention_mask=MASK, max_new_tokens=NEW, prefill_chunk=16,
            stop=[[last], pair], on_token=seen.append,
        )
    )  # fmt: skip

    def end(row: np.ndarray) -> int:
        return next(
            (i + 1 for i in range(NEW) if row[i] == last or row[: i + 1][-2:].tolist() == pair), NEW
        )

    ends = [end(row) for row in free]
    assert ends[0] < max(ends)
    assert found.shape == (3, max(ends))
    for row, stop in enumerate(ends):
        np.testing.assert_array_equal(found[row, :stop], free[row, :stop])
        assert (found[row, stop:] == last).all()
    np.testing.assert_array_equal(np.stack([each.tokens for each in seen], 1), found)
    np.testing.assert_array_equal(np.sum([each.is_new for each in seen], 0), ends)


def test_stop_is_the_configuration_s_unless_given(model: Decoder) -> None:
    free = np.asarray(generate(model, TOKENS, seed=3, stop=(), **SAMPLING))
    end = int(free[1, 4])
    model.config = dataclasses.replace(CONFIG, eos_token_ids=(end,), pad_token_id=9)
    rows = np.asarray(generate(model, TOKENS, seed=3, **SAMPLING))
    model.config = CONFIG
    first = free[1].tolist().index(end)
    np.testing.assert_array_equal(rows[1, : first + 1], free[1, : first + 1])
    assert (rows[1, first + 1 :] == 9).all()
    assert rows.shape[1] > first + 1


def test_nothing_is_traced_again(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[tuple[int, ...]] = []
    call = Decoder.__call__

    def counted(self: Decoder, tokens: Any, **options: Any) -> Any:
        traced.append(tokens.shape)
        return call(self, tokens, **options)

    monkeypatch.setattr(Decoder, "__call__", counted)
    rows = TOKENS[:2]
    generate(model, rows, max_new_tokens=NEW, stop=(), prefill_chunk=16)
    assert sorted(traced) == [(2, 1), (2, 16)]
    for length in (23, 17, 20):  # other lengths, other ends
        generate(model, rows[:, :length], max_new_tokens=5, stop=(3, 4), prefill_chunk=16)
    assert len(traced) == 2


def test_a_step_holds_no_second_cache(model: Decoder) -> None:
    from models.cache import KVCache
    from models.generation.steps import Ends, Rows, steps_of

    cache = KVCache.empty(CONFIG, batch=2, capacity=4096)
    steps = steps_of(model, Chance(True, None, False))
    draw = Draw(jax.random.split(jax.random.key(0), 2), jnp.float32(0), jnp.float32(1))
    ends = Ends(jnp.zeros((1, 1), jnp.int32), jnp.int32(0))
    row = jnp.zeros(2, jnp.int32)
    rows = Rows(row, row[:, None], row.astype(bool), jnp.int32(0))
    step: Any = steps.step
    compiled = step.lower(steps.weights, cache, rows, draw, ends).compile()
    memory, kept = compiled.memory_analysis(), sum(x.nbytes for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= kept
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < kept / 100
    # What attention in XLA lays out anew on a CPU is another shape.
    assert not re.search(r"= f32\[2,4096,2,8\]\S* copy\(", compiled.as_text())


def test_tokens_come_before_the_last_is_computed(model: Decoder) -> None:
    tokens = stream(model, TOKENS, max_new_tokens=NEW, prefill_chunk=16, stop=())
    first = next(tokens)
    assert first.is_new.all()
    tokens.close()  # type: ignore[attr-defined]


class TestChoice:
    LOGITS = jnp.log(jnp.asarray([[0.05, 0.4, 0.25, 0.2, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2]]))

    def drawn(self, *, temperature: float = 1.0, top_k: Any = None, top_p: Any = None) -> Any:
        """Shares (2, 5) of the tokens, of 2000 draws."""
        chance = Chance(False, top_k, top_p is not None)
        draw = Draw(
            jax.random.split(jax.random.key(0), 2),
            jnp.float32(temperature),
            jnp.float32(1 if top_p is None else top_p),
        )
        one = lambda count: choose(self.LOGITS, chance, draw, count)  # noqa: E731
        tokens = jax.jit(jax.vmap(one))(jnp.arange(2000, dtype=jnp.int32))
        return np.stack([np.bincount(row, minlength=5) / 2000 for row in np.asarray(tokens).T])

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [[0.05, 0.4, 0.25, 0.2, 0.1], [0.2] * 5]),
            ({"top_k": 2}, [[0, 0.4 / 0.65, 0.25 / 0.65, 0, 0], [0.5, 0.5, 0, 0, 0]]),
            ({"top_k": 1}, [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),
            # 0.4 + 0.25 falls short of 0.66; three of 0.2 are enough for 0.55.
            ({"top_p": 0.66}, [[0, 0.4 / 0.85, 0.25 / 0.85, 0.2 / 0.85, 0], [0.25] * 4 + [0]]),
            ({"top_p": 0.55}, [[0, 0.4 / 0.65, 0.25 / 0.65, 0, 0], [1 / 3] * 3 + [0, 0]]),
            ({"top_p": 1e-6}, [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),
            # Of the 3 likeliest 0.4 / 0.85 and 0.25 / 0.85 reach 0.7.
            ({"top_k": 3, "top_p": 0.7},
             [[0, 0.4 / 0.65, 0.25 / 0.65, 0, 0], [1 / 3] * 3 + [0, 0]]),
            ({"temperature": 1e-30}, [[0, 1, 0, 0, 0], [0.2] * 5]),
            ({"temperature": 1e-40}, [[0, 1, 0, 0, 0], [0.2] * 5]),
        ],
        ids=str,
    )  # fmt: skip
    def test_shares_are_those_of_the_filtered_softmax(
        self, options: dict[str, Any], expected: Any
    ) -> None:
        found, exact = self.drawn(**options), np.asarray(expected)
        np.testing.assert_array_equal(found[exact == 0], 0)
        # Five standard deviations of a share.
        assert (np.abs(found - exact) <= 5 * np.sqrt(exact * (1 - exact) / 2000)).all()

    def test_temperature_is_the_power_of_the_shares(self) -> None:
        exact = np.asarray([0.05, 0.4, 0.25, 0.2, 0.1]) ** 2
        exact /= exact.sum()
        found = self.drawn(temperature=0.5)[0]
        assert (np.abs(found - exact) <= 5 * np.sqrt(exact * (1 - exact) / 2000)).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": np.zeros((2, 0), int)}, r"tokens must be \(B, T\), at least one row"),
        ({"tokens": np.zeros(3, int)}, r"got \(3,\)"),
        ({"tokens": [[1, 2], [3]]}, "rectangular"),
        ({"tokens": np.ones((2, 3))}, "tokens must be integers, got float64"),
        ({"tokens": [[1, VOCABULARY]]}, r"tokens\[0, 1\] is 96: the vocabulary is 0 to 95"),
        ({"tokens": [[-1, 2]]}, r"tokens\[0, 0\] is -1"),
        ({"attention_mask": [[1, 1, 1]]}, r"attention_mask must have the tokens' shape \(2, 3\)"),
        ({"attention_mask": [[1, 0, 1], [1, 1, 1]]}, "row 0 has padding between its tokens"),
        ({"attention_mask": [[1, 1, 1], [1, 1, 0]]}, "row 1 ends with padding"),
        ({"attention_mask": [[1, 1, 1], [0, 0, 0]]}, "row 1 has no token"),
        ({"attention_mask": [[1, 1, 1], [0.5, 1, 1]]}, "1 for real tokens and 0 for padding"),
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer of at least 0, got -1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"seed": 0.5}, "seed must be an integer, or one for each of 2 rows"),
        ({"seed": [1, 2, 3]}, "seed must be an integer, or one for each of 2 rows"),
        ({"stop": "</s>"}, "stop must be token ids"),
        ({"stop": [96]}, "stop has 96"),
        ({"stop": [[]]}, "a sequence needs a token"),
        ({"stop": [True]}, "a token of stop must be an integer"),
        ({"prefill_chunk": 0}, "prefill_chunk must be an integer of at least 1, got 0"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_a_line(
    model: Decoder, change: dict[str, Any], words: str
) -> None:
    arguments: dict[str, Any] = {"tokens": np.ones((2, 3), int), "max_new_tokens": 2} | change
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        stream(model, arguments.pop("tokens"), **arguments)
    assert "\n" not in str(caught.value)


def test_traced_tokens_are_refused(model: Decoder) -> None:
    with pytest.raises(TypeError, match="call it outside jit"):
        jax.jit(lambda x: generate(model, x, max_new_tokens=2))(jnp.ones((1, 3), jnp.int32))


def test_more_than_the_model_was_trained_for_is_a_warning(model: Decoder) -> None:
    with pytest.warns(UserWarning, match="come to 68 tokens, the model was trained for 64"):
        stream(model, np.ones((1, 3), int), max_new_tokens=65)


def test_no_token_is_asked_for(model: Decoder) -> None:
    assert generate(model, np.ones((2, 3), int), max_new_tokens=0).shape == (2, 0)
