"""Numbers of bytes in words."""

from __future__ import annotations

from jattn.call.sizes import is_known

__all__ = ["in_bytes"]


def in_bytes(count: int) -> str:
    """The number with a binary unit, as in "3 MiB", "1.5 MiB" and "24 MiB"."""
    if not is_known(count):  # jax.export's free sizes
        return f"{count} B"
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            text = f"{size:.1f}" if size < 10 else f"{size:.0f}"
            return f"{text.removesuffix('.0')} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
