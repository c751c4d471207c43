"""Nine steps of the Hopper kernels, with numbers that docs/kernels.md records."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["STEPS", "Step"]

KERNELS = Path(__file__).parents[1] / "kernels.md"


@dataclass(frozen=True)
class Step:
    """One step: TFLOP/s before and after in one call, and where kernels.md has it."""

    name: str
    call: str
    before: int
    after: int
    section: str
    tries: tuple[int, ...]

    def __post_init__(self) -> None:
        """ValueError if kernels.md does not have both numbers there."""
        part = KERNELS.read_text().split(f"\n## {self.section}")[1].split("\n## ")[0]
        found = re.split(r"\n(\d+)\. ", part)
        text = " ".join(found[found.index(str(n)) + 1] for n in self.tries)
        missing = [n for n in (self.before, self.after) if not re.search(rf"\b{n}\b", text)]
        if missing:
            raise ValueError(f"{self.name}: kernels.md has no {missing} in tries {self.tries}")

    @property
    def gain(self) -> str:
        return f"{self.after / self.before:.2f}×"


FORWARD, BACKWARD = "Hopper forward", "Hopper backward"
STEPS = (
    Step("larger blocks", "128 full, 16k", 625, 714, FORWARD, (6, 4)),
    Step("no product serialised", "128 causal, 16k", 605, 706, FORWARD, (1,)),
    Step("warpgroups take turns", "64 full, 4k", 509, 523, FORWARD, (4,)),
    Step("a list of tiles", "128 causal, 1k", 407, 462, FORWARD, (3,)),
    Step("no pause between tiles", "128 causal, 1k", 404, 497, FORWARD, (9,)),
    Step("the list read ahead", "128 full, 1k", 571, 597, FORWARD, (13,)),
    Step("a list only where it wins", "128 causal, 16k", 681, 718, FORWARD, (14,)),
    Step("dQ in its own kernel", "256 full, 1k, backward", 392, 433, BACKWARD, (12,)),
    Step("a counter", "128, eight documents, 16k", 478, 557, FORWARD, (21,)),
    Step("one head after another", "128 full, 1k", 547, 651, FORWARD, (26,)),
)
