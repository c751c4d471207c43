"""Kernels that are tried on small calls, and are chosen for long ones."""

from __future__ import annotations

import pytest

from pallas_kernels.hopper import backward_tiles

# What these try is what is chosen.
AS_CHOSEN = ("test_joined", "test_fuzz", "test_memcheck")


@pytest.fixture(autouse=True)
def none_joined(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of a short call are not one launch, which would be of other kernels."""
    if request.path.stem not in AS_CHOSEN:
        monkeypatch.setattr(backward_tiles, "MOST_JOINED", 0)
