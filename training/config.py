"""The trainer's configuration: one frozen value, its presets, and its form in config.json.

The text under each field is the option's help.
"""

import dataclasses
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from models import TransformerConfig
from models.implementations import AttnImplementation
from training.errors import TrainingError

PresetName = Literal["cpu", "gpu"]


def _require_at_least(least: int, config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")


@dataclasses.dataclass(frozen=True)
class FineTuneConfig:
    """The model of another's making that is trained on, if one is."""

    model: Annotated[
        str | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: a new model)")
    ] = None
    """Fine-tune the model of this folder in Hugging Face's format on text, cut into its tokens, and
    save it so in the run's model/. The folder says its sizes: of the options that describe a model
    only attn-implementation, rematerialize, dtype and param-dtype apply."""

    def __post_init__(self) -> None:
        if self.model == "":
            raise ValueError("model must name a folder, got an empty name")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and how it is cut."""

    data: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="PATH", help_behavior_hint="(default: the running Python's standard library)"
        ),
    ] = None
    """File or folder of any bytes to learn from, of text in UTF-8 where a folder's model is
    fine-tuned; hidden files are left out."""

    held_out_fraction: float = 0.05
    """Share of the bytes held out, by whole files chosen by name; of a single file its end."""

    sequence_length: int = 1024
    """Bytes in one training sequence, T; tokens where a folder's model is fine-tuned."""

    batch_size: int = 1
    """Sequences in one step."""

    short_sequence_length: int = 256
    """Bytes in one sequence of the first steps, which are then as many more in a batch."""

    short_share: float = 0.0
    """Share of the steps, the first ones, that take the short sequences: most is learnt from near
    bytes, and attention is cheap there."""

    pack_documents: bool = False
    """Let a byte or token see only those of its own file where a sequence spans several."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(
                f"held_out_fraction must be above 0 and below 1, got {self.held_out_fraction}"
            )
        _require_at_least(1, self, "sequence_length", "batch_size", "short_sequence_length")
        if not 0 <= self.short_share < 1:
            raise ValueError(f"short_share must be at least 0 and below 1, got {self.short_share}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, linear warm-up, then a cosine."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon makes the updates of the blocks' matrices orthogonal, and leaves the rest to AdamW."""

    steps: int = 1000
    """Number of updates."""

    learning_rate: float = 3e-3
    """Highest learning rate, reached at the end of the warm-up."""

    warmup_fraction: float = 0.06
    """Share of the steps over which the learning rate rises from zero."""

    final_learning_rate_ratio: float = 0.05
    """Learning rate at the last step, as a share of the highest."""

    weight_decay: float = 0.1
    """Decay of the weights per unit of learning rate."""

    beta1: float = 0.9
    """Memory of the gradient, AdamW's and Muon's."""

    beta2: float = 0.99
    """AdamW's memory of the squared gradient."""

    clip_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""

    seed: int = 0
    """Fixes the initial weights and the order of the data."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "steps")
        _require_at_least(0, self, "learning_rate", "weight_decay", "seed")
        for name in ("beta1", "beta2", "warmup_fraction", "final_learning_rate_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {self.seed}")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {self.clip_norm}")


@dataclasses.dataclass(frozen=True)
class RecordConfig:
    """What is measured and kept while training."""

    log_every: int = 50
    """Steps between two printed lines; metrics.jsonl has every step."""

    evaluate_every: int = 100
    """Steps between two measurements on held-out text."""

    evaluation_windows: int = 32
    """Held-out sequences measured, spread evenly over the text, in whole batches."""

    checkpoint_every: int = 250
    """Steps between two checkpoints; one is always written at the end and on Ctrl-C."""

    keep_checkpoints: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, *(field.name for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """The memory-scaling report that comes before training."""

    memory_report: bool = True
    """Measure memory and time of the attention layer's gradient at growing lengths first."""

    memory_lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    """Sequence lengths of the report."""

    memory_implementations: tuple[AttnImplementation, ...] = ("eager", "memory_efficient")
    """Attention implementations of the report, by the names that the model takes."""

    memory_seconds: float = 15.0
    """Time budget of the report's runs, compilation apart; what does not fit is not timed."""

    def __post_init__(self) -> None:
        if not self.memory_lengths or min(self.memory_lengths) < 1:
            raise ValueError(f"memory_lengths must be positive, got {self.memory_lengths}")
        allowed = get_args(AttnImplementation)
        for name in self.memory_implementations:
            if name not in allowed:
                raise ValueError(
                    f"memory_implementations must be among {', '.join(allowed)}; got {name!r}"
                )
        _require_at_least(0, self, "memory_seconds")


@dataclasses.dataclass(frozen=True)
class StepReportConfig:
    """The report on whole training steps, `--report step`; no part of a run's configuration."""

    step_lengths: tuple[int, ...] = (256, 1024, 4096)
    """Sequence lengths of the report on whole steps."""

    step_implementations: tuple[AttnImplementation, ...] = ("eager", "sdpa", "memory_efficient")
    """Its attention implementations."""

    step_seconds: float = 60.0
    """Time budget of its runs, compilation apart; what does not fit is not timed."""

    def __post_init__(self) -> None:
        if not self.step_lengths or min(self.step_lengths) < 1:
            raise ValueError(f"step_lengths must be positive, got {self.step_lengths}")
        _require_at_least(0, self, "step_seconds")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that describes a run; stored in its config.json."""

    model: TransformerConfig = dataclasses.field(default_factory=TransformerConfig.cpu)
    """The model."""

    fine_tune: FineTuneConfig = FineTuneConfig()
    """Or one that is there already."""

    data: DataConfig = DataConfig()
    """The corpus."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW or Muon with warm-up and cosine."""

    record: RecordConfig = RecordConfig()
    """Printing, measuring and checkpoints."""

    memory: MemoryConfig = MemoryConfig()
    """The memory-scaling report that comes before training."""


PRESETS: dict[PresetName, TrainConfig] = {
    "cpu": TrainConfig(
        data=DataConfig(batch_size=2, short_share=0.8),
        optimizer=OptimizerConfig(
            optimizer="muon", steps=1150, learning_rate=1e-2, beta1=0.95, beta2=0.95
        ),
        record=RecordConfig(evaluate_every=230),
    ),
    "gpu": TrainConfig(
        model=TransformerConfig.gpu(),
        data=DataConfig(sequence_length=32_768, batch_size=1, pack_documents=True),
        optimizer=OptimizerConfig(
            optimizer="muon",
            steps=1000,
            learning_rate=2e-3,
            warmup_fraction=0.1,
            beta1=0.95,
            beta2=0.95,
        ),
        record=RecordConfig(
            log_every=10, evaluate_every=100, evaluation_windows=16, checkpoint_every=250
        ),
        memory=MemoryConfig(
            memory_lengths=tuple(1024 << doublings for doublings in range(11)),
            memory_implementations=("eager", "memory_efficient", "flash"),
            memory_seconds=60.0,
        ),
    ),
}

# With --model: AdamW at the rates of fine-tuning, documents apart, the layers' report left out.
FINE_TUNING: dict[PresetName, TrainConfig] = {
    "cpu": TrainConfig(
        data=DataConfig(sequence_length=512, pack_documents=True),
        optimizer=OptimizerConfig(
            steps=100, learning_rate=2e-5, warmup_fraction=0.1, weight_decay=0.0, beta2=0.999
        ),
        record=RecordConfig(
            log_every=10, evaluate_every=50, evaluation_windows=8, checkpoint_every=50
        ),
        memory=MemoryConfig(memory_report=False),
    ),
    "gpu": TrainConfig(
        model=TransformerConfig(dtype="bfloat16", rematerialize="block"),
        data=DataConfig(sequence_length=8192, pack_documents=True),
        optimizer=OptimizerConfig(
            steps=300, learning_rate=1e-5, warmup_fraction=0.1, weight_decay=0.0, beta2=0.999
        ),
        record=RecordConfig(
            log_every=10, evaluate_every=100, evaluation_windows=16, checkpoint_every=100
        ),
        memory=MemoryConfig(memory_report=False),
    ),
}

STEP_REPORTS: dict[PresetName, StepReportConfig] = {
    "cpu": StepReportConfig(),
    "gpu": StepReportConfig(
        step_lengths=(4096, 16_384, 65_536, 262_144),
        step_implementations=("eager", "sdpa", "memory_efficient", "flash"),
        step_seconds=180.0,
    ),
}

# A resumed run continues bit for bit only if none of these changed.
_SHAPES_THE_LOSSES = ("model", "fine_tune", "data", "optimizer")


def differences(stored: TrainConfig, given: TrainConfig) -> list[str]:
    """Options that shape the losses and differ, as 'name (stored value, given value)'."""
    return [
        f"{field.name} (was {getattr(getattr(stored, section), field.name)},"
        f" now {getattr(getattr(given, section), field.name)})"
        for section in _SHAPES_THE_LOSSES
        for field in dataclasses.fields(getattr(stored, section))
        if getattr(getattr(stored, section), field.name)
        != getattr(getattr(given, section), field.name)
    ]


def from_json(values: Any, source: str) -> TrainConfig:
    """The configuration that `dataclasses.asdict` turned into `values`, read back from JSON.

    Raises:
        TrainingError: an option is missing, unknown or has a value that is not allowed.
    """
    try:
        config = _build(TrainConfig, values)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"{source} is not a configuration of this trainer: {error}") from error
    assert isinstance(config, TrainConfig)
    return config


def _build(kind: Callable[..., Any], values: Any) -> Any:
    if not dataclasses.is_dataclass(kind):
        return _checked(kind, values)
    types_of = get_type_hints(kind)
    if not isinstance(values, dict) or values.keys() != types_of.keys():
        given = sorted(values) if isinstance(values, dict) else values
        raise ValueError(f"expected the options {sorted(types_of)}, got {given}")
    return kind(**{name: _build(types_of[name], value) for name, value in values.items()})


def _checked(kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple:
        return tuple(_checked(get_args(kind)[0], item) for item in value)
    if get_origin(kind) is Literal:
        return value  # the dataclass itself refuses a name that is not allowed
    allowed = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(value) not in allowed and not (kind is float and type(value) is int):
        raise TypeError(f"expected {kind}, got {value!r}")
    return value
