"""The named runs: which cells, passes and peers, and what must hold of the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, product

from benchmarks.all_shapes import all_shapes
from benchmarks.cells import Cell, Mask, Pass
from benchmarks.hopper_shapes import hopper_shapes
from benchmarks.plans import FAST_PEERS, SLOW_PEERS, Plan, Preset
from benchmarks.targets import Growth, Memory, More, Pace, Rate, Speed, Target, Time

__all__ = ["FAST_PEERS", "PRESETS", "SLOW_PEERS", "Plan", "Preset", "custom"]

FAST_CPU_PEERS = ("jattn/memory_efficient", "jax.nn/xla")
CPU_PEERS = ("jattn/memory_efficient", "jattn/eager", "jax.nn/xla")
PORTABLE_PEERS = (
    "jattn/flash-portable",
    "jattn/memory_efficient",
    "torch/flash",
    "torch/efficient",
    "tokamax/triton",
    "tokamax/xla_chunked",
)
DETERMINISTIC = "jattn/flash-deterministic"
DERIVATIVE_PEERS = ("jattn/flash", "jattn/flash-portable", "jattn/memory_efficient-xla")
CAUSAL = Mask("causal")
RIVALS = ("jax.nn/cudnn", "tokamax/mosaic")


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
        peers: tuple[str, ...] = FAST_PEERS + SLOW_PEERS if compared_with_all else FAST_PEERS
        if judged == "backward" and head_dim <= 128:  # wider heads' gradients always repeat
            peers += (DETERMINISTIC,)
            targets.append(Speed(shown.name, judged, DETERMINISTIC, 0.8, ("jattn/flash",)))
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
    every_peer = dict.fromkeys(peer for plan in plans for peer in plan.peers)
    return Preset(tuple(plans), tuple(every_peer), tuple(targets))


def portable(*, tokens: int = 16384, width: int = 2048) -> Preset:
    """The portable kernels on one GPU, bf16, T = `tokens` / 4, beside kernels of their own kind."""
    length = tokens // 4

    def cell(head_dim: int, mask: str) -> Cell:
        heads, batch = max(width // head_dim, 1), tokens // length
        return Cell(batch, length, length, heads, heads, head_dim, Mask.parse(mask))

    both: tuple[Pass, ...] = ("forward", "gradient")
    flash, chunked = "jattn/flash-portable", "jattn/memory_efficient"
    rates = {128: (320, 240), 64: (270, 215), 256: (220, 120)}  # TFLOP/s on an H200
    plans: list[Plan] = []
    targets: list[Target] = []
    for head_dim, mask in product(rates, ("causal", "full")):
        shown = cell(head_dim, mask)
        plans.append(Plan(shown, both, PORTABLE_PEERS))
        judged: tuple[tuple[Pass, int], ...] = tuple(
            zip(("forward", "backward"), rates[head_dim], strict=True)
        )
        for which, rate in judged:
            targets.append(Rate(shown.name, which, flash, rate))
            if head_dim == 128:
                targets.append(Speed(shown.name, which, chunked, 1.2, ("torch/efficient",)))
                targets.append(Speed(shown.name, which, chunked, 5.0, ("tokamax/xla_chunked",)))
    plain = cell(128, "full")
    biased, dropped = replace(plain, bias=True), replace(plain, dropout=0.1)
    plans.append(Plan(biased, both, (*PORTABLE_PEERS, *RIVALS)))
    targets.append(Time(biased.name, "gradient", flash, 10.0))
    # The bias and its gradient, which are not counted, take 2 N T² bytes each.
    linear = 4 * 2 * biased.elements / 2**20
    targets.append(Memory(biased.name, "gradient", flash, linear))
    plans.append(Plan(dropped, both, PORTABLE_PEERS))
    for which in both:
        targets.append(Speed(dropped.name, which, flash, 1 / 1.2, (flash,), plain.name))
    # For information: float32 in full precision.
    in_xla = ("jattn/memory_efficient-xla", "jax.nn/xla")
    peers = (flash, chunked, "torch/efficient", *in_xla)
    for mask in ("causal", "full"):
        single = replace(cell(128, mask), dtype="float32")
        plans.append(Plan(single, both, peers, repeats=3))
    return Preset(tuple(plans), (*PORTABLE_PEERS, *RIVALS, *in_xla), tuple(targets))


def derivatives(*, heads: int = 24, length: Sequence[int] = (8192, 16384)) -> Preset:
    """Forward-mode and second derivatives on one GPU, bf16: jvp of full attention, HVP of causal.

    The bounds in milliseconds are for an H100: of a jvp, and of its gradients beside it. The
    tangent's kernel is what a jvp does beside forward.
    """
    plans: list[Plan] = []
    targets: list[Target] = []
    ours, bounds = "jattn/flash", {8192: (6.5, 27.0), 16384: (26.0, 105.0)}
    for t in length:
        shown = Cell(1, t, t, heads, heads, 128, Mask("full"))
        plans.append(Plan(shown, ("forward", "jvp", "jvp-gradient"), DERIVATIVE_PEERS))
        targets.append(Pace(shown.name, "jvp", "forward", ours, 0.75))
        if (t, heads) in {(of, 24) for of in bounds}:
            along, back = bounds[t]
            targets.append(Time(shown.name, "jvp", ours, along))
            targets.append(More(shown.name, "jvp-gradient", "jvp", ours, back))
    causal = Cell(1, max(length), max(length), max(heads // 2, 1), max(heads // 2, 1), 64, CAUSAL)
    plans.append(Plan(causal, ("forward", "gradient", "hvp"), DERIVATIVE_PEERS))
    if (causal.queries, causal.heads) == (16384, 12):
        targets.append(Time(causal.name, "hvp", ours, 13.0))
    return Preset(tuple(plans), DERIVATIVE_PEERS, tuple(targets))


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
    "hopper-shapes": hopper_shapes,
    "portable": portable,
    "derivatives": derivatives,
    "all": all_shapes,
}
