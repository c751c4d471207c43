"""One benchmark cell: the shape, mask and options of an attention call, and the work in it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cell", "Mask", "Pass"]

type Kind = Literal["full", "causal", "window", "packed", "documents"]
# gradient: one call that computes the output and every gradient. backward: gradient - forward.
# jvp: the output and its tangent along query, key and value. hvp: the same of the gradients.
# jvp-gradient: jvp, and the gradients of both by query, key, value and their tangents.
type Pass = Literal["forward", "gradient", "backward", "jvp", "jvp-gradient", "hvp"]

_KINDS: tuple[str, ...] = get_args(Kind.__value__)
_SIZED = ("window", "packed", "documents")


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees; all kinds but `full` are causal.

    Written "full", "causal", "window:1023" (query i sees keys i - 1023 to i), "packed:8" (eight
    documents of equal length in one sequence) or "documents:8" (cut at random places).
    """

    kind: Kind
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """The mask written so; ValueError if none is."""
        kind, _, size = text.partition(":")
        sized = kind in _SIZED
        has_none = sized and kind != "window" and size == "0"
        if kind not in _KINDS or sized != size.isdigit() or has_none:
            allowed = "full, causal, window:LEFT, packed:DOCUMENTS or documents:DOCUMENTS"
            raise ValueError(f"mask must be {allowed}, got {text!r}")
        return cls(kind, int(size) if sized else 0)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.kind}:{self.size}" if self.kind in _SIZED else self.kind

    @property
    def has_documents(self) -> bool:
        """Whether there are several in a sequence."""
        return self.kind in ("packed", "documents")


@dataclass(frozen=True)
class Cell:
    """One call, in the letters of `jax.nn`: queries T, keys S, heads N, kv_heads K."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: Mask
    dtype: str = "bfloat16"
    bias: bool = False  # (1, N, T, S), with a gradient
    dropout: float = 0.0
    value_dim: int | None = None  # D, where it is not H

    def __post_init__(self) -> None:
        heads, widths = (self.heads, self.kv_heads), (self.head_dim, self.values)
        sizes = (self.batch, self.queries, self.keys, *heads, *widths)
        if min(sizes) < 1:
            raise ValueError(f"every size of a cell must be at least 1, got {self}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        square = self.queries == self.keys
        documents, is_packed = self.mask.size, self.mask.kind == "packed"
        uneven = self.queries % documents if is_packed else self.queries < documents
        if self.mask.has_documents and (uneven or not square):
            least = "a multiple of" if is_packed else "at least"
            raise ValueError(
                f"{self.mask} needs {least} {documents} queries and as many keys,"
                f" got {self.queries} and {self.keys}"
            )

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The cell that `to_json` wrote."""
        known = {field.name for field in dataclasses.fields(cls)}
        found = {name: value for name, value in fields.items() if name in known}
        return cls(**{**found, "mask": Mask.parse(found["mask"])})

    def to_json(self) -> dict[str, Any]:
        """Plain values, the mask as text."""
        return {**dataclasses.asdict(self), "mask": str(self.mask)}

    @property
    def name(self) -> str:
        """Its name on the command line and in results; differs where cells differ."""
        group = f"k{self.kv_heads}" if self.kv_heads != self.heads else ""
        keys = f"-s{self.keys}" if self.keys != self.queries else ""
        value = "" if self.values == self.head_dim else f"v{self.values}"
        name = f"h{self.head_dim}{value}-n{self.heads}{group}-{self.mask}"
        name += f"-b{self.batch}-t{self.queries}{keys}"
        name += "-bias" if self.bias else ""
        name += f"-dropout{self.dropout}" if self.dropout else ""
        return name if self.dtype == "bfloat16" else f"{name}-{self.dtype}"

    @property
    def values(self) -> int:
        """D, the head dim of value and output."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def elements(self) -> int:
        """B * T * N * H, the size of the query."""
        return self.batch * self.queries * self.heads * self.head_dim

    def visible(self, query: int) -> range:
        """The keys that this query sees."""
        if self.mask.kind == "full":
            return range(self.keys)
        stop = min(query + 1, self.keys)
        if self.mask.kind == "window":
            return range(min(max(0, query - self.mask.size), stop), stop)
        starts = self._starts
        return range(int(starts[np.searchsorted(starts, query, "right") - 1]), stop)

    @property
    def _starts(self) -> NDArray[np.int64]:
        """Where documents begin."""
        count = self.mask.size if self.mask.has_documents else 1
        if self.mask.kind != "documents":
            return np.arange(count) * (self.queries // count)
        drawn = np.random.default_rng(0).choice(self.queries - 1, count - 1, replace=False)
        return np.concatenate([[0], np.sort(drawn) + 1])

    def documents(self) -> NDArray[np.int32]:
        """(T,) the document of each position."""
        found = np.searchsorted(self._starts, np.arange(self.queries), "right") - 1
        return found.astype(np.int32)

    def document_starts(self) -> NDArray[np.int32]:
        """(T,) the first position of each position's document."""
        return self._starts[self.documents()].astype(np.int32)

    def dense_mask(self) -> NDArray[np.bool_]:
        """(T, S), True where a query sees a key."""
        spans = [self.visible(query) for query in range(self.queries)]
        start = np.array([span.start for span in spans])[:, None]
        stop = np.array([span.stop for span in spans])[:, None]
        keys = np.arange(self.keys)
        return (keys >= start) & (keys < stop)

    def visible_pairs(self) -> float:
        """(query, key) pairs that count as work in one head of one batch row.

        Causal attention over T positions counts as T² / 2, as papers count it; a window counts its
        pairs exactly.
        """
        if self.mask.kind == "full":
            return self.queries * self.keys
        if self.mask.has_documents or (self.mask.kind == "causal" and self.queries == self.keys):
            lengths = np.bincount(self.documents()).astype(np.float64)
            return float((lengths**2).sum() / 2)
        return sum(len(self.visible(query)) for query in range(self.queries))

    def flops(self, which: Pass) -> float:
        """Floating-point operations: matmuls, two forward and five each backward and of a tangent.

        A tangent of the gradients is twelve more.
        """
        h, d = self.head_dim, self.values
        forward = h + d  # Q Kᵀ; P V
        backward = 3 * h + 2 * d  # Q Kᵀ, dQ, dK; dP, dV
        tangent = 3 * h + 2 * d  # Q Kᵀ, tQ Kᵀ, Q tKᵀ; P tS V, P tV
        of_gradients = 7 * h + 5 * d
        widths = {
            "forward": forward,
            "backward": backward,
            "gradient": forward + backward,
            "jvp": forward + tangent,
            "jvp-gradient": forward + tangent + backward + of_gradients,
            "hvp": forward + backward + tangent + of_gradients,
        }[which]
        return 2.0 * self.batch * self.heads * widths * self.visible_pairs()
