"""What a whole training step takes, by attention and with and without rematerialisation.

Measured is the trainer's own update of the whole model (forward, backward, clipping, optimiser) on
one sequence that is one document: the compiled program's memory, and its time.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from models import TransformerConfig
from models.implementations import AttnImplementation
from models.rematerialisation import Rematerialize
from training.config import StepReportConfig, TrainConfig
from training.reports.cells import Cell, Job, Watch, fill
from training.reports.place import Place
from training.reports.running import Run, run
from training.step import TrainState, abstract_state, initial_state, train_step


def what_is_measured(model: TransformerConfig) -> str:
    return (
        f"training step of the whole model, {model.num_layers} layers of width"
        f" {model.hidden_size}, batch 1, {model.dtype}"
    )


def measure(
    config: TrainConfig, report: StepReportConfig, place: Place, watch: Watch
) -> list[Cell]:
    """The report's cells, by implementation and length; none once a stop was asked for."""
    jobs = [
        _job(config, Cell(name, length, rematerialized), place)
        for name in dict.fromkeys(report.step_implementations)
        for rematerialized in (False, True)
        for length in sorted(set(report.step_lengths))
    ]
    return fill(jobs, place, watch, seconds=report.step_seconds)


def _job(config: TrainConfig, cell: Cell, place: Place) -> Job:
    changed = of_length(config, cell.sequence_length)
    model = variant(config.model, cell.implementation, rematerialized=bool(cell.rematerialized))
    changed = dataclasses.replace(changed, model=model)
    return Job(
        cell, functools.partial(lower, changed, place), functools.partial(_run, changed, place)
    )


def variant(
    model: TransformerConfig, name: AttnImplementation, *, rematerialized: bool
) -> TransformerConfig:
    """One block is compiled for all, as many variants are."""
    kept: Rematerialize = "block" if rematerialized else "nothing"
    return dataclasses.replace(
        model, attn_implementation=name, rematerialize=kept, scan_blocks=True
    )


def of_length(config: TrainConfig, length: int) -> TrainConfig:
    """The configuration with one sequence of this length in a step, and that one document."""
    data = dataclasses.replace(
        config.data, sequence_length=length, batch_size=1, short_share=0.0, pack_documents=False
    )
    return dataclasses.replace(config, data=data)


def lower(config: TrainConfig, place: Place) -> jax.stages.Lowered:
    """The trainer's update for one sequence."""
    tokens = jax.ShapeDtypeStruct((1, config.data.sequence_length), np.uint8)
    state, tokens = place.whole(abstract_state(config)), place.cut(tokens)
    lowered: jax.stages.Lowered = train_step.lower(
        state, tokens, tokens, None, config=config.optimizer
    )
    return lowered


def first_state(config: TrainConfig, place: Place) -> TrainState:
    """The state before the first step; made by one program for all variants of a model."""
    plain = dataclasses.replace(config, model=variant(config.model, "eager", rematerialized=False))
    state = dataclasses.replace(initial_state(plain), graph=abstract_state(config).graph)
    placed: TrainState = place.whole(state)
    return placed


def random_tokens(length: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(256, size=(1, length), dtype=np.uint8)


def _run(
    config: TrainConfig, place: Place, program: Any, *, expected_bytes: int, deadline: float
) -> Run:
    tokens = place.cut(jax.device_put(random_tokens(config.data.sequence_length)))

    def execute(state: TrainState) -> TrainState:
        state, _ = jax.block_until_ready(program(state, tokens, tokens, None))
        placed: TrainState = place.whole(state)
        return placed

    return run(
        execute,
        lambda: first_state(config, place),
        expected_bytes=expected_bytes,
        deadline=deadline,
    )
