"""The training loop: steps, held-out text, metrics, checkpoints, and stopping where asked."""

import dataclasses
import math
import time
from collections.abc import Iterator
from statistics import fmean

import jax

from training.ahead import Programs
from training.checkpoints import Checkpoints
from training.config import TrainConfig
from training.data import Batch, Corpus, evaluation_batches, training_batch
from training.errors import AgreedError
from training.interrupt import StopRequest
from training.progress import TrainingProgress
from training.run_folder import MetricsLog
from training.step import BITS_PER_NAT, TrainState, model_config
from training.throughput import Pace, peak_flops


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where the loop writes."""

    log: MetricsLog
    checkpoints: Checkpoints
    progress: TrainingProgress


def batch_of(config: TrainConfig, corpus: Corpus, step: int) -> Batch:
    """What the run learns from in one step."""
    options = config.optimizer
    return training_batch(
        corpus.train, config.data, seed=options.seed, step=step, steps=options.steps
    )


def held_out_batches(config: TrainConfig, corpus: Corpus) -> Iterator[Batch]:
    """What is measured, the same each time."""
    return evaluation_batches(corpus.held_out, config.data, config.record.evaluation_windows)


def train(
    config: TrainConfig,
    corpus: Corpus,
    state: TrainState,
    programs: Programs,
    outputs: Outputs,
    stop: StopRequest,
    *,
    began: float,
    held_out_loss: float | None = None,
) -> TrainState:
    """Runs the steps that are left, or up to a stop request; the last state is checkpointed.

    A row of the log has the loss of the weights before its update and, when due, the held-out
    result of those after it; row 0 has only the latter.

    Args:
        config: the run's.
        corpus: what it learns from, and is measured on.
        state: before the steps that are left.
        programs: those of the configuration, on the run's devices.
        outputs: where it writes.
        stop: who may ask it to stop.
        began: when what the first step has waited for began, by `time.perf_counter`.
        held_out_loss: nats, of the state given, where that has been measured already.

    Raises:
        AgreedError: the loss is no longer finite.
    """
    total, record = config.optimizer.steps, config.record
    log, checkpoints, progress = outputs.log, outputs.checkpoints, outputs.progress
    peak = peak_flops(config.model, jax.devices()[0])
    pace = Pace(model_config(config), peak=None if peak is None else peak * programs.devices.count)
    bits, held_out_bits = (BITS_PER_NAT * density for density in corpus.units_per_byte)

    def held_out() -> float:
        return programs.held_out_loss(state, held_out_batches(config, corpus)) * held_out_bits

    def held_out_before() -> float:
        return held_out() if held_out_loss is None else held_out_loss * held_out_bits

    first = int(state.step) + 1
    batch = batch_of(config, corpus, first)
    programs.prepare_update(batch)
    programs.prepare_held_out_loss(next(held_out_batches(config, corpus)))
    progress.line("bits per byte; training is the mean since the line before")
    if log.last_step < 0 and not stop.anywhere():
        row = {"step": 0, "held_out_bits_per_byte": held_out_before()}
        log.write(row)
        progress.line(_line(row, total, [], {}))
    since_line: list[float] = []
    shape: tuple[int, ...] = ()
    for step in range(first, total + 1):
        if stop.anywhere():
            break
        if batch.inputs.shape != shape:
            shape = batch.inputs.shape
            progress.line(shape_line(shape, corpus.unit, config.data.sequence_length))
        started = time.perf_counter()
        state, in_flight = programs.update(state, batch)
        next_batch = batch_of(config, corpus, step + 1)  # prepared while the device works
        scalars = jax.device_get(in_flight)
        seconds = time.perf_counter() - started
        if not math.isfinite(scalars.loss):
            raise AgreedError(
                f"the loss at step {step} is {scalars.loss}; start again with a lower"
                f" --learning-rate (it was {config.optimizer.learning_rate}) or a larger"
                " --warmup-fraction"
            )
        row = {
            "step": step,
            "loss": float(scalars.loss),
            "bits_per_byte": float(scalars.loss) * bits,
            "gradient_norm": float(scalars.gradient_norm),
            "learning_rate": float(scalars.learning_rate),
            "seconds": seconds,
            **pace.add(batch, seconds),
        }
        if step == first:
            row["seconds_since_start"] = time.perf_counter() - began
        measured = step % record.evaluate_every == 0 or step == total
        if measured:
            row["held_out_bits_per_byte"] = held_out()
        log.write(row)
        progress.advance(step, row["bits_per_byte"])
        since_line.append(row["bits_per_byte"])
        if measured or step == first or step % record.log_every == 0:
            progress.line(_line(row, total, since_line, pace.take()))
            since_line.clear()
        if step % record.checkpoint_every == 0:
            checkpoints.save(state)
        batch = next_batch
    programs.close()
    checkpoints.save(state)
    return state


def shape_line(shape: tuple[int, ...], unit: str, length: int) -> str:
    """What a step learns from, and where that is shorter than what held-out text is read in."""
    text = f"{shape[0]} x {shape[1]:,} {unit} a step"
    if shape[1] < length:
        text += f"; held-out sequences are of {length:,}, which the last steps are for"
    return text


def _line(row: dict[str, float], total: int, training: list[float], rates: dict[str, float]) -> str:
    parts = [f"step {row['step']:{len(str(total))}}/{total}"]
    parts.append(f"training {fmean(training):.3f}" if training else f"{'':14}")
    held_out = row.get("held_out_bits_per_byte")
    parts.append(f"{'':14}" if held_out is None else f"held-out {held_out:.3f}")
    if "learning_rate" in row:
        parts.append(f"lr {row['learning_rate']:.1e}")
    if rates:
        parts.append(f"{rates['tokens_per_second']:,.0f} tokens/s")
    elif "seconds_since_start" in row:
        parts.append(f"{row['seconds_since_start']:.1f} s after the start")
    elif "seconds" in row:
        parts.append(f"{row['seconds']:.1f} s with compilation")
    if "mfu" in rates:
        parts.append(f"MFU {rates['mfu']:.1%}")
    return "   ".join(parts).rstrip()
