"""PyTorch's scaled_dot_product_attention backends in a cell, ready to be timed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.cells import Cell, Pass
from benchmarks.row_check import row_error, rows_to_check

__all__ = ["Ready", "facts", "prepare", "refusal"]

# Not installed with jattn: looked up when a run asks for it.
torch: Any = importlib.import_module("torch")
attention: Any = importlib.import_module("torch.nn.attention")

BACKENDS = {
    "torch/flash": attention.SDPBackend.FLASH_ATTENTION,
    "torch/efficient": attention.SDPBackend.EFFICIENT_ATTENTION,
    "torch/cudnn": attention.SDPBackend.CUDNN_ATTENTION,
}


def refusal(peer: str, cell: Cell) -> str | None:
    """Why this peer cannot do the cell, as far as is known before it is tried."""
    if not torch.cuda.is_available():
        return "PyTorch peers are timed on an NVIDIA GPU alone, and PyTorch sees none"
    dense = cell.mask.kind == "window" or cell.mask.has_documents
    if dense and cell.queries * cell.keys > 2**26:
        return f"{cell.mask} would need a dense mask of {cell.queries} x {cell.keys}"
    if peer == "torch/flash" and (dense or cell.bias):
        return f"takes no mask or bias beyond causal ({cell.name})"
    return None


class Ready:
    """One pass of one backend; calling it runs it to its end. Arrays are (B, N, T, H)."""

    compile_s = 0.0
    temp_bytes: int | None = None

    def __init__(self, peer: str, cell: Cell, which: Pass) -> None:
        if which not in ("forward", "gradient"):
            raise NotImplementedError(f"PyTorch's kernels have no {which}")
        self._cell, self._which, self._backend = cell, which, BACKENDS[peer]
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        gradient = which == "gradient"
        self._query = self._random(cell.queries, cell.heads, cell.head_dim, gradient=gradient)
        self._key = self._random(cell.keys, cell.kv_heads, cell.head_dim, gradient=gradient)
        self._value = self._random(cell.keys, cell.kv_heads, cell.values, gradient=gradient)
        self._cotangent = self._random(cell.queries, cell.heads, cell.values, gradient=False)
        self._mask = self._additive_mask(gradient=gradient)

    def _random(self, length: int, heads: int, width: int, *, gradient: bool) -> Any:
        shape = (self._cell.batch, length, heads, width)
        made = torch.randn(shape, dtype=getattr(torch, self._cell.dtype), device=self._device)
        return made.transpose(1, 2).requires_grad_(gradient)

    def _additive_mask(self, *, gradient: bool) -> Any:
        """Bias and whatever `is_causal` cannot say; None where it says all."""
        cell, dtype = self._cell, getattr(torch, self._cell.dtype)
        if not cell.bias and cell.mask.kind in ("full", "causal"):
            return None
        shape = (1, cell.heads if cell.bias else 1, cell.queries, cell.keys)
        make = torch.randn if cell.bias else torch.zeros
        mask = make(shape, dtype=dtype, device=self._device)
        if cell.mask.kind != "full":
            hidden = torch.from_numpy(~cell.dense_mask()).to(self._device)
            mask = mask.masked_fill(hidden, float("-inf"))
        return mask.requires_grad_(gradient and cell.bias)

    def launch(self) -> Any:
        """Starts the call without waiting for it."""
        with attention.sdpa_kernel([self._backend]):
            out = torch.nn.functional.scaled_dot_product_attention(
                self._query,
                self._key,
                self._value,
                attn_mask=self._mask,
                dropout_p=self._cell.dropout,
                is_causal=self._mask is None and self._cell.mask.kind == "causal",
                enable_gqa=self._cell.heads != self._cell.kv_heads,
            )
        if self._which == "forward":
            return out
        inputs = [self._query, self._key, self._value]
        inputs += [self._mask] if self._cell.bias else []
        return out, torch.autograd.grad(out, inputs, self._cotangent)

    def __call__(self) -> Any:
        result = self.launch()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return result

    def too_large(self) -> str | None:
        """PyTorch says so itself when it runs."""
        return None

    def error(self, result: Any) -> float | None:
        """The largest relative error of some rows of the output; None if it cannot be known."""
        if self._which != "forward" or self._cell.dropout:
            return None
        group = self._cell.heads // self._cell.kv_heads
        errors = []
        for b, t, n in rows_to_check(self._cell):
            kept = {
                "query": self._query[b, n, t],
                "key": self._key[b, n // group],
                "value": self._value[b, n // group],
            }
            if self._cell.bias:
                kept["bias"] = self._mask[0, n, t]
            host = {name: x.detach().double().cpu().numpy() for name, x in kept.items()}
            row = result[b, n, t].detach().double().cpu().numpy()
            errors.append(row_error(self._cell, (b, t, n), host, row))
        return max(errors)

    def device_times(self, repeats: int) -> tuple[list[float], str]:
        """Milliseconds of all kernels of each call, by CUPTI; by CUDA events if that fails."""
        try:
            return self._kernel_times(repeats), "CUPTI, sum of kernels (torch.profiler)"
        except (RuntimeError, ValueError) as error:
            return self._event_times(repeats), f"CUDA events (profiler: {error})"

    def _kernel_times(self, repeats: int) -> list[float]:
        cuda = torch.profiler.ProfilerActivity.CUDA
        with torch.profiler.profile(activities=[cuda]) as profile:
            for _ in range(repeats):
                self.launch()
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        kernels = [event for event in profile.events() if event.device_type == on_device]
        if not kernels or len(kernels) % repeats:
            raise ValueError(f"{len(kernels)} kernels in {repeats} calls")
        kernels.sort(key=lambda event: event.time_range.start)
        times = np.array([event.time_range.elapsed_us() for event in kernels], np.float64)
        return [float(us) / 1e3 for us in times.reshape(repeats, -1).sum(axis=1)]

    def _event_times(self, repeats: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            self.launch()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]


def prepare(peer: str, cell: Cell, which: Pass) -> Ready:
    """Makes the operands; what a backend raises comes with the first call."""
    return Ready(peer, cell, which)


def facts() -> Mapping[str, Any]:
    """The versions of what runs."""
    versions = {"torch": str(torch.__version__), "torch cuda": str(torch.version.cuda)}
    if torch.backends.cudnn.is_available():
        versions["torch cudnn"] = str(torch.backends.cudnn.version())
    return {"versions": versions}
