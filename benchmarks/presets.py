"""The named runs: which cells, passes and peers, and what must hold of the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from benchmarks.cells import Cell, Mask, Pass
from benchmarks.targets import Growth, Memory, Speed, Target

__all__ = ["PRESETS", "Plan", "Preset", "custom"]

FAST_CPU_PEERS = ("jattn/memory_efficient", "jax.nn/xla")
CPU_PEERS = ("jattn/memory_efficient", "jattn/eager", "jax.nn/xla")
FAST_PEERS = ("jattn/flash", "jax.nn/cudnn", "tokamax/mosaic", "torch/flash", "torch/cudnn")
# Far behind on a GPU: they run in few cells unless they are asked for by name.
SLOW_PEERS = (
    "jattn/memory_efficient",
    "jattn/eager",
    "jax.nn/xla",
    "tokamax/triton",
    "tokamax/xla_chunked",
    "torch/efficient",
)
RIVALS = ("jax.nn/cudnn", "tokamax/mosaic")


@dataclass(frozen=True)
class Plan:
    """One cell to measure. Only compiled, for its memory, where `timed` is false."""

    cell: Cell
    passes: tuple[Pass, ...]
    peers: tuple[str, ...]
    timed: bool = True
    repeats: int | None = None  # timed calls; None: as the command line says


@dataclass(frozen=True)
class Preset:
    """Cells in the order to run, every peer the run speaks of, and the targets."""

    plans: tuple[Plan, ...]
    peers: tuple[str, ...]
    targets: tuple[Target, ...] = ()


def cpu(
    *,
    length: Sequence[int] = (4096,),
    heads: int = 8,
    head_dim: Sequence[int] = (64,),
    window: int = 256,
) -> Preset:
    """jattn's CPU backend next to `jax.nn` with the same arguments, float32, batch 1."""
    plans: list[Plan] = []
    targets: list[Target] = []
    ours, theirs = "jattn/memory_efficient", ("jax.nn/xla",)
    sped: dict[str, dict[Pass, float]] = {
        "causal": {"forward": 1.8, "gradient": 1.8},
        "full": {"forward": 1.15, "gradient": 1.0},
        f"window:{window}": {"forward": 8.0, "gradient": 8.0},
    }
    for t, h in product(length, head_dim):

        def cell(mask: str, t: int = t, h: int = h, dtype: str = "float32") -> Cell:
            return Cell(1, t, t, heads, heads, h, Mask.parse(mask), dtype)

        both: tuple[Pass, ...] = ("forward", "gradient")
        for mask, bounds in sped.items():
            plans.append(Plan(cell(mask), both, FAST_CPU_PEERS))
            for which, bound in bounds.items():
                targets.append(Speed(cell(mask).name, which, ours, bound, theirs))
        # For information, no target: bfloat16, and every backend where the formula takes less long.
        plans.append(Plan(cell("causal", dtype="bfloat16"), both, FAST_CPU_PEERS, repeats=3))
        for size in (t // 8, t // 4, t // 2):
            plans.append(Plan(cell("causal", t=max(size, 1)), both, CPU_PEERS))
        plans.append(Plan(cell("causal", t=2 * t), ("gradient",), CPU_PEERS, timed=False))
        memory = [cell("causal", t=size) for size in (t // 2, t, 2 * t)]
        # 160 MiB at 4096 x 8 x 64, and in proportion.
        targets.append(Memory(memory[1].name, "gradient", ours, 160 * memory[1].elements / 2**21))
        for small, large in pairwise(memory):
            targets.append(Growth(large.name, small.name, "gradient", ours, 2.1))
    return Preset(tuple(plans), CPU_PEERS, tuple(targets))


def hopper_forward(*, tokens: int = 16384, width: int = 2048) -> Preset:
    """The forward pass on one Hopper GPU, bf16: `tokens` tokens, heads * head_dim = `width`."""
    preset = _hopper(("forward",), "forward", tokens, width)
    plans, targets = list(preset.plans), list(preset.targets)
    heads = max(width // 128, 1) * 2
    for batch in (16, 1):
        cell = Cell(batch, 1, 2 * tokens, heads, max(heads // 4, 1), 128, Mask("full"))
        plans.append(Plan(cell, ("forward",), FAST_PEERS))
        targets.append(Speed(cell.name, "forward", "jattn/flash", 0.95, ("jax.nn/cudnn",)))
    return Preset(tuple(plans), preset.peers, tuple(targets))


def hopper_backward(*, tokens: int = 16384, width: int = 2048) -> Preset:
    """The backward pass on one Hopper GPU: (forward + backward) - forward, every kernel counted."""
    return _hopper(("forward", "gradient"), "backward", tokens, width)


def _hopper(passes: tuple[Pass, ...], judged: Pass, tokens: int, width: int) -> Preset:
    def cell(head_dim: int, mask: str, length: int) -> Cell:
        heads = max(width // head_dim, 1)
        return Cell(tokens // length, length, length, heads, heads, head_dim, Mask.parse(mask))

    lengths = (tokens, tokens // 4, tokens // 16)
    plans: list[Plan] = []
    targets: list[Target] = []
    for head_dim, mask, length in product((128, 64, 256), ("causal", "full"), lengths):
        shown = cell(head_dim, mask, length)
        compared_with_all = head_dim == 128 and length == tokens // 4
        peers = FAST_PEERS + SLOW_PEERS if compared_with_all else FAST_PEERS
        plans.append(Plan(shown, passes, peers))
        targets.append(Speed(shown.name, judged, "jattn/flash", 1.0, RIVALS))
    window, packed = (
        cell(128, f"window:{tokens // 16 - 1}", tokens),
        cell(128, "packed:8", tokens),
    )
    plans += [Plan(window, passes, FAST_PEERS), Plan(packed, passes, FAST_PEERS)]
    targets.append(Speed(window.name, judged, "jattn/flash", 1.0, ("jax.nn/cudnn",)))
    causal = cell(128, "causal", tokens).name
    targets.append(Speed(packed.name, judged, "jattn/flash", 5.0, ("jattn/flash",), causal))
    return Preset(tuple(plans), FAST_PEERS + SLOW_PEERS, tuple(targets))


def custom(
    *,
    peers: tuple[str, ...],
    head_dim: Sequence[int] = (128,),
    mask: Sequence[str] = ("causal",),
    length: Sequence[int] = (4096,),
    tokens: int = 16384,
    batch: int | None = None,
    keys: int | None = None,
    width: int = 2048,
    heads: int | None = None,
    kv_heads: int | None = None,
    dtype: str = "bfloat16",
    bias: bool = False,
    dropout: float = 0.0,
    passes: Sequence[Pass] = ("forward", "gradient"),
) -> Preset:
    """Every combination of these head dims, masks and lengths."""
    plans = []
    for h, m, t in product(head_dim, mask, length):
        n = heads or max(width // h, 1)
        plans.append(
            Plan(
                Cell(
                    batch=batch or max(tokens // t, 1),
                    queries=t,
                    keys=keys or t,
                    heads=n,
                    kv_heads=kv_heads or n,
                    head_dim=h,
                    mask=Mask.parse(m),
                    dtype=dtype,
                    bias=bias,
                    dropout=dropout,
                ),
                tuple(passes),
                peers,
            )
        )
    return Preset(tuple(plans), peers)


PRESETS: dict[str, Callable[..., Preset]] = {
    "cpu": cpu,
    "hopper-forward": hopper_forward,
    "hopper-backward": hopper_backward,
}
