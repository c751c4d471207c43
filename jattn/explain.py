"""`jattn.explain`: what a call would run, and why nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from jattn.attention import with_full_signature
from jattn.backends import table
from jattn.backends.table import NAMES, Form, Implementation
from jattn.call.arguments import AttentionOptions, attention_call
from jattn.call.keywords import check_keywords
from jattn.call.spec import AttentionSpec
from jattn.call.target import Target, asking_about, target_of
from jattn.call.units import in_bytes
from jattn.transforms.context import plan_of
from jattn.transforms.per_shard import on_one_device

__all__ = ["BackendReport", "Explanation", "explain"]

type Shaped = ArrayLike | jax.ShapeDtypeStruct


@dataclass(frozen=True)
class BackendReport:
    """One backend and one call.

    Attributes:
      name: the backend's.
      refusals: why it cannot run; then kernel and gradient_bytes are None.
      passed_over: why another kernel of its own, made for this device, does not run.
      may_run: whether it is among those that were named, or that run unnamed.
      kernel: what it would run; of few queries its forward cuts the keys into parts; tiles of
        packed documents come from a counter, as only their ids tell how long each takes.
      gradient_bytes: an estimate of what the gradient's computation, forward with it, holds beside
        the call's own arguments, results and their gradients.
      tangents: what makes the tangents, of forward mode and second derivatives, from what forward
        saved: "Pallas, Hopper", "Pallas, portable", loops in "XLA", or for "eager" "JAX" itself;
        and what makes others, where not all are made alike.
    """

    name: str
    refusals: tuple[str, ...]
    passed_over: tuple[str, ...]
    may_run: bool
    kernel: str | None
    gradient_bytes: int | None
    tangents: str | None


@dataclass(frozen=True)
class Explanation:
    """What a call would run. `str()` of it is a table.

    Attributes:
      call: the call's shapes and options, in words.
      target: the device it is for, in words.
      chosen: the name of the backend that would run; None if none can, and the call would raise.
      reports: one for each backend.
      hints: what about the call may be another than was meant.
      sequence: how a sequence that is cut over several devices is computed, with the bytes that
        each sends; None if it is not.
    """

    call: str
    target: str
    chosen: str | None
    reports: tuple[BackendReport, ...]
    hints: tuple[str, ...] = ()
    sequence: str | None = None

    @property
    def kernel(self) -> str | None:
        """What the chosen backend would run."""
        return next((r.kernel for r in self.reports if r.name == self.chosen), None)

    def __str__(self) -> str:
        head = ["  backend", "runs", "extra memory of the gradient", "tangents by", "why"]
        body = [
            [
                ("> " if report.name == self.chosen else "  ") + report.name,
                report.kernel or "-",
                "-" if report.gradient_bytes is None else in_bytes(report.gradient_bytes),
                report.tangents or "-",
                _why(report, self.chosen),
            ]
            for report in self.reports
        ]
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(4)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]])
            for row in [head, *body]
        ]
        if self.chosen is None:
            lines.append(self._what_would_help())
        more = [] if self.sequence is None else [f"sequence: {self.sequence}"]
        more += [f"hint: {hint}" for hint in self.hints]
        return "\n".join([f"attention: {self.call}", f"on: {self.target}", *lines, *more])

    def _what_would_help(self) -> str:
        named = ", ".join(report.name for report in self.reports if report.may_run)
        others = ", ".join(report.name for report in self.reports if not report.refusals)
        return (
            f"nothing that may run ({named}) can, and the call raises UnsupportedAttentionError: "
            f"change what is refused, or let others run, of which these can: {others or 'none'}"
        )


@with_full_signature
def explain(
    query: Shaped,
    key: Shaped,
    value: Shaped,
    bias: Shaped | None = None,
    mask: Shaped | None = None,
    *,
    implementation: Implementation | None = None,
    device: str | None = None,
    **options: Unpack[AttentionOptions],
) -> Explanation:
    """Says which backend `jattn.dot_product_attention` would run for these arguments, and why.

    Takes the same arguments, each array or its `jax.ShapeDtypeStruct`. Nothing is computed. Where
    query's sequence is sharded, by its `sharding` or by `jattn.context_parallel`, it says by which
    schedule the call would go, and what each device sends.

    Args:
      query: as in `jattn.dot_product_attention`, like all arguments but `device`.
      key: as there.
      value: as there.
      bias: as there.
      mask: as there.
      implementation: as there.
      device: ask about another than calls here are traced for: "cpu", or a GPU that need not be
        here, as "H100", "A100", "B200", "L4" or "RTX 4090".
      **options: as there.

    Raises:
      ValueError, TypeError: as the call; a device of no known name.

    >>> import jax, jax.numpy as jnp, jattn
    >>> x = jax.ShapeDtypeStruct((1, 65536, 8, 64), jnp.bfloat16)
    >>> jattn.explain(x, x, x, is_causal=True, device="H100").kernel
    'Pallas Mosaic GPU, Hopper'
    >>> jattn.explain(x, x, x, is_causal=True, device="cpu").chosen
    'memory_efficient'
    """
    check_keywords("explain", options)
    spec = _spec(dict(query=query, key=key, value=value, bias=bias, mask=mask, **options))
    candidates = table.candidates(implementation)
    with asking_about(device):
        given = (query, key, value, bias, mask, *options.values())
        target = target_of([x for x in given if isinstance(x, jax.Array)])
        reports = [_report(name, spec, target, candidates) for name in NAMES]
        runs = (form.name for form in candidates if not form.reasons(spec, target))
        chosen = next(runs, None)
    sequence = _sequence(spec, query, key, chosen)
    hints = _hints(spec, options)
    return Explanation(spec.describe(), str(target), chosen, tuple(reports), hints, sequence)


def _sequence(spec: AttentionSpec, query: Shaped, key: Shaped, chosen: str | None) -> str | None:
    """How the chosen backend computes a sequence that is cut over devices."""
    if spec.context is not None:
        return plan_of(spec).describe()
    placed = _sharding(query)
    if placed is None or chosen is None:
        return None
    takes_parts = all(form.takes_parts for form in table.forms_of(chosen))
    part = on_one_device(spec, placed, _sharding(key), takes_parts=takes_parts)
    if part.context is None:
        return None
    return plan_of(part).describe()


def _sharding(x: Shaped) -> NamedSharding | None:
    """By name, of an array that is somewhere or a shape that says where it will be."""
    found = getattr(x, "sharding", None)
    return found if isinstance(found, NamedSharding) else None


_ARRAYS = {
    "query", "key", "value", "bias", "mask", "query_seq_lengths", "key_value_seq_lengths",
    "query_segment_ids", "key_value_segment_ids", "query_offset", "sinks", "dropout_rng",
}  # fmt: skip


def _is_array(name: str, x: Any) -> bool:
    """Whether an argument is an array to the call, and not part of what is static."""
    if name == "scale":
        return isinstance(x, jax.Array | jax.ShapeDtypeStruct)
    is_array = hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, np.integer)
    # An array of text, say, is the call's to refuse.
    return (
        name in _ARRAYS and is_array and not (isinstance(x, np.ndarray) and x.dtype.kind in "OSU")
    )


def _spec(arguments: dict[str, Any]) -> AttentionSpec:
    """The spec that a call with these arguments has, from their shapes alone."""
    arrays = {name: x for name, x in arguments.items() if _is_array(name, x)}
    static = {name: x for name, x in arguments.items() if name not in arrays}
    found: list[AttentionSpec] = []
    jax.eval_shape(lambda arrays: found.append(attention_call(**arrays, **static).spec), arrays)
    return found[0]


def _report(
    name: str, spec: AttentionSpec, target: Target, candidates: tuple[Form, ...]
) -> BackendReport:
    refusals: list[str] = []
    passed_over: list[str] = []
    runs: Form | None = None
    for form in table.forms_of(name):
        reasons = form.reasons(spec, target)
        if runs is None and not reasons:
            runs = form
        elif runs is None:
            refusals += reasons
            passed_over += reasons if form.lacks(target) is None else []
    return BackendReport(
        name=name,
        refusals=tuple(dict.fromkeys(refusals)) if runs is None else (),
        passed_over=() if runs is None else tuple(passed_over),
        may_run=any(form.name == name for form in candidates),
        kernel=None if runs is None else runs.kernel(spec, target),
        gradient_bytes=None if runs is None else _gradient_bytes(runs, spec, target),
        tangents=None if runs is None else runs.tangents(spec, target),
    )


def _gradient_bytes(form: Form, spec: AttentionSpec, target: Target) -> int:
    """0 of a call without rows or keys, which no backend runs."""
    return 0 if spec.is_empty else form.gradient_bytes(spec, target)


def _hints(spec: AttentionSpec, options: AttentionOptions) -> tuple[str, ...]:
    """What a call with these facts is often meant to be instead."""
    if spec.free_sizes:
        return ()
    places_queries = (
        options.get("query_offset") is not None or options.get("causal_alignment") == "bottom_right"
    )
    names = ("is_causal", "local_window_size")
    banded = " and ".join(name for name in names if options.get(name) not in (None, False))
    found = {
        f"{banded} with T {spec.queries} and S {spec.keys}: query i stands at key i, as in jax.nn; "
        "if the last query belongs at the last key, give causal_alignment='bottom_right'; with a "
        "cache or chunks give query_offset, the key position of query 0": (
            bool(banded) and spec.queries != spec.keys and not places_queries
        ),
        f"heads (query {spec.heads}, key {spec.kv_heads}) outnumber queries or keys "
        f"(T {spec.queries}, S {spec.keys}): arrays are read as (B, T, N, H); if these are "
        "(B, N, T, H), give jnp.swapaxes(x, 1, 2)": (
            spec.heads > spec.queries and (spec.queries > 1 or spec.kv_heads > spec.keys)
        ),
    }
    return tuple(hint for hint, applies in found.items() if applies)


def _why(report: BackendReport, chosen: str | None) -> str:
    if report.refusals:
        return "; ".join(report.refusals)
    if report.name == chosen:
        why = "runs"
    elif report.may_run:
        why = "can, but another comes first"
    else:
        why = "can; runs only when named"
    return "; ".join([why, *report.passed_over])
