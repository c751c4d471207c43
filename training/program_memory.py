"""What a compiled program takes, by its compiler's account."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Memory:
    """The compiler's account of one execution, in bytes of each device."""

    temporary: int
    arguments: int
    results: int  # those that take no argument's place

    @property
    def total(self) -> int:
        return self.temporary + self.arguments + self.results

    @property
    def added(self) -> int:
        """What comes to arguments that are there."""
        return self.temporary + self.results


def memory_of(program: Any) -> Memory:
    """The account of a `jax.stages.Compiled`."""
    found = program.memory_analysis()
    assert found is not None
    return Memory(
        found.temp_size_in_bytes,
        found.argument_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
    )
