"""What a multiprocessor has of shared memory for one program."""

from __future__ import annotations

__all__ = ["shared_kib"]


def shared_kib(capability: tuple[int, int] | None) -> int:
    """KiB of shared memory that a program may use, by compute capability; None: the most.

    CUDA C++ Programming Guide, "Technical specifications per compute capability".
    """
    if capability is None or capability in ((9, 0), (10, 0), (10, 3)):
        return 227
    return 163 if capability in ((8, 0), (8, 7)) else 99
