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
from training.data import Batch, Corpus, Text, evaluation_batches, training_batch
from training.errors import AgreedError
from training.interrupt import StopRequest
from training.progress import TrainingProgress
from training.run_folder import MetricsLog
from training.step import BITS_PER_NAT, StepScalars, TrainState, model_config
from training.throughput import Pace, peak_flops


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where the loop writes."""

    log: MetricsLog
    checkpoints: Checkpoints
    progress: TrainingProgress


def batch_of(config: TrainConfig, text: Text, step: int) -> Batch:
    """What the run learns from in one step, of the text for that."""
    options = config.optimizer
    return training_batch(text, config.data, seed=options.seed, step=step, steps=options.steps)


def held_out_batches(config: TrainConfig, text: Text) -> Iterator[Batch]:
    """What is measured, the same each time, of the text held out."""
    return evaluation_batches(text, config.data, config.record.evaluation_windows)


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

    The device has its next update before the last one's row is written, unless what that left is
    to be measured or saved. A row of the log has the loss of the weights before its update and,
    when due, the held-out result of those after it; row 0 has only the latter.

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
    total, options, checkpoints = config.optimizer.steps, config.record, outputs.checkpoints
    first = int(state.step) + 1
    record = _Record(config, corpus, programs, outputs, first, began)
    batch = batch_of(config, corpus.train, first)
    programs.prepare_update(batch)
    programs.prepare_held_out_loss(next(held_out_batches(config, corpus.held_out)))
    record.begin(state, held_out_loss, stop)
    shape: tuple[int, ...] = ()
    under_way: _Update | None = None
    for step in range(first, total + 1):
        if stop.anywhere():
            break
        if batch.inputs.shape != shape:
            record.finish(under_way)
            under_way = None
            shape = batch.inputs.shape
            outputs.progress.line(shape_line(shape, corpus.unit, config.data.sequence_length))
        asked_at = time.perf_counter()
        state, scalars = programs.update(state, batch)
        before, under_way = under_way, _Update(step, batch, scalars, asked_at)
        batch = batch_of(config, corpus.train, step + 1)  # prepared while the device works
        record.finish(before)
        measured = step % options.evaluate_every == 0 or step == total
        saved = step % options.checkpoint_every == 0
        if measured or saved or step == first:
            record.finish(under_way, measured=state if measured else None)
            under_way = None
            programs.keep()
        if saved:
            checkpoints.save(state)
    record.finish(under_way)
    programs.close()
    checkpoints.save(state)
    return state


@dataclasses.dataclass(frozen=True)
class _Update:
    """One that the device has been asked for."""

    step: int
    batch: Batch
    scalars: StepScalars
    asked_at: float  # by `time.perf_counter`


class _Record:
    """Rows of the log, and lines on the screen."""

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        programs: Programs,
        outputs: Outputs,
        first: int,
        began: float,
    ) -> None:
        self._config, self._corpus, self._programs = config, corpus, programs
        self._log, self._progress = outputs.log, outputs.progress
        self._first, self._began = first, began
        peak = peak_flops(config.model, jax.devices()[0])
        self._pace = Pace(
            model_config(config), peak=None if peak is None else peak * programs.devices.count
        )
        self._bits, self._held_out_bits = (
            BITS_PER_NAT * density for density in corpus.units_per_byte
        )
        self._since_line: list[float] = []
        self._done_at = 0.0  # when the update before was

    def begin(self, state: TrainState, held_out_loss: float | None, stop: StopRequest) -> None:
        """What the lines are, and of a new run row 0."""
        self._progress.line("bits per byte; training is the mean since the line before")
        if self._log.last_step < 0 and not stop.anywhere():
            found = self._held_out(state) if held_out_loss is None else held_out_loss
            row = {"step": 0, "held_out_bits_per_byte": found * self._held_out_bits}
            self._log.write(row)
            self._progress.line(_line(row, self._config.optimizer.steps, [], {}))

    def finish(self, update: _Update | None, *, measured: TrainState | None = None) -> None:
        """Waits for an update, if there is one, and writes its row.

        Args:
            update: the one.
            measured: its state, if held-out text is to be measured.
        """
        if update is None:
            return
        step, options = update.step, self._config.optimizer
        scalars = jax.device_get(update.scalars)
        now = time.perf_counter()
        seconds, self._done_at = now - max(update.asked_at, self._done_at), now
        if not math.isfinite(scalars.loss):
            raise AgreedError(
                f"the loss at step {step} is {scalars.loss}; start again with a lower"
                f" --learning-rate (it was {options.learning_rate}) or a larger"
                " --warmup-fraction"
            )
        row = {
            "step": step,
            "loss": float(scalars.loss),
            "bits_per_byte": float(scalars.loss) * self._bits,
            "gradient_norm": float(scalars.gradient_norm),
            "learning_rate": float(scalars.learning_rate),
            "seconds": seconds,
            **self._pace.add(update.batch, seconds),
        }
        if step == self._first:
            row["seconds_since_start"] = now - self._began
        if measured is not None:
            row["held_out_bits_per_byte"] = self._held_out(measured) * self._held_out_bits
        self._log.write(row)
        self._progress.advance(step, row["bits_per_byte"])
        self._since_line.append(row["bits_per_byte"])
        if measured is not None or step == self._first or step % self._config.record.log_every == 0:
            self._progress.line(_line(row, options.steps, self._since_line, self._pace.take()))
            self._since_line.clear()

    def _held_out(self, state: TrainState) -> float:
        batches = held_out_batches(self._config, self._corpus.held_out)
        return self._programs.held_out_loss(state, batches)


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
