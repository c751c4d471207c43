"""One update, and the measurement on held-out text: what the device runs."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx

from models import Decoder, DecoderConfig, TransformerConfig, TransformerLM
from training import fine_tuning
from training.config import OptimizerConfig, TrainConfig
from training.muon import muon

BITS_PER_NAT = 1 / math.log(2)


type Graph = nnx.GraphDef[TransformerLM] | nnx.GraphDef[Decoder]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "optimizer"],
    meta_fields=["graph"],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step. The order of the data follows from the step."""

    step: jax.Array  # int32, updates done
    params: nnx.State[Any, Any]
    optimizer: optax.OptState
    graph: Graph


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class StepScalars:
    """What one update reports, float32."""

    loss: jax.Array  # nats per byte or token
    gradient_norm: jax.Array  # before clipping
    learning_rate: jax.Array


def initial_state(config: TrainConfig) -> TrainState:
    """The state before the first step, a function of the seed or of the folder to fine-tune."""
    if config.fine_tune.model is not None:
        return _state_of(fine_tuning.load(config), config.optimizer)
    state: TrainState = new_state(config.model, config.optimizer)
    return state


def abstract_state(config: TrainConfig) -> TrainState:
    """Shapes and dtypes of the state, to restore a checkpoint into."""
    if config.fine_tune.model is not None:
        return _state_of(fine_tuning.abstract_model(config), config.optimizer)
    state = jax.eval_shape(functools.partial(new_state, config.model, config.optimizer))
    assert isinstance(state, TrainState)
    return state


def model_config(config: TrainConfig) -> TransformerConfig | DecoderConfig:
    """What the model that is trained is like."""
    if config.fine_tune.model is None:
        return config.model
    return fine_tuning.decoder_config_of(config)


def check_model_runs(config: TrainConfig) -> None:
    """Traces one update without running it.

    Raises:
        jattn.UnsupportedAttentionError: the named implementation cannot do this size here.
    """
    kind = np.uint8 if config.fine_tune.model is None else np.int32
    tokens = np.zeros((config.data.batch_size, config.data.sequence_length), kind)
    ids = tokens.astype(np.int32) if config.data.pack_documents else None
    step = functools.partial(train_step, config=config.optimizer)
    jax.eval_shape(step, abstract_state(config), tokens, tokens, ids)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def train_step(
    state: TrainState,
    inputs: jax.Array,
    targets: jax.Array,
    segment_ids: jax.Array | None,
    *,
    config: OptimizerConfig,
) -> tuple[TrainState, StepScalars]:
    """Forward, backward, clip, update."""
    loss, gradients = jax.value_and_grad(_mean_loss)(
        state.params, state.graph, inputs, targets, segment_ids
    )
    update = _optimizer(config, state.params).update
    updates, optimizer = update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    scalars = StepScalars(
        loss, optax.tree.norm(gradients), jnp.asarray(_schedule(config)(state.step), jnp.float32)
    )
    return TrainState(state.step + 1, params, optimizer, state.graph), scalars


def parameter_count(config: TrainConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_state(config).params))


@functools.partial(jax.jit, static_argnums=(0, 1))
def new_state(model: TransformerConfig, config: OptimizerConfig) -> TrainState:
    """The state before the first step of a new model."""
    graph, params = nnx.split(TransformerLM(model, rngs=nnx.Rngs(config.seed)))
    optimizer = _optimizer(config, params).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer, graph)


def _state_of(model: Decoder, config: OptimizerConfig) -> TrainState:
    """The state before the first step; of an abstract model an abstract one."""
    graph, params = nnx.split(model)

    def beginning(params: nnx.State[Any, Any]) -> tuple[jax.Array, optax.OptState]:
        return jnp.zeros((), jnp.int32), _optimizer(config, params).init(params)

    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    begin = functools.partial(jax.eval_shape, beginning) if abstract else jax.jit(beginning)
    step, optimizer = begin(params)
    return TrainState(step, params, optimizer, graph)


def _mean_loss(
    params: nnx.State[Any, Any],
    graph: Graph,
    inputs: jax.Array,
    targets: jax.Array,
    segment_ids: jax.Array | None,
) -> jax.Array:
    model: Any = nnx.merge(graph, params)
    if isinstance(model, Decoder):
        return model.loss(inputs, targets, segment_ids=segment_ids)
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(
        model(inputs, segment_ids=segment_ids), targets.astype(jnp.int32)
    )
    return losses.mean()


held_out_loss = jax.jit(_mean_loss, static_argnames="graph")
"""The mean over a batch's targets, in nats, of its weights, graph, inputs, targets and segments."""


def _schedule(config: OptimizerConfig) -> optax.Schedule:
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=int(config.warmup_fraction * config.steps),
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_learning_rate_ratio,
    )
    return lambda done: schedule(done + 1)  # the first step, after 0 done, already learns


def _optimizer(config: OptimizerConfig, params: Any) -> optax.GradientTransformation:
    """For weights like these."""
    if config.optimizer == "muon":
        update = muon(
            _schedule(config),
            beta1=config.beta1,
            beta2=config.beta2,
            weight_decay=config.weight_decay,
        )
    else:
        update = optax.adamw(
            _schedule(config),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=_matrices if any(leaf.ndim < 2 for leaf in jax.tree.leaves(params)) else None,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _matrices(weights: Any) -> Any:
    """Which weights decay: gains and biases do not."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, weights)
