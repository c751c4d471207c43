"""Query-chunked attention for any NVIDIA GPU from Ampere on, forward and backward.

Backward makes a chunk's exact weights again from the log-sum-exp, as flash attention's does: the
equations are the same, and so are the kernels.
"""

from __future__ import annotations

from pallas_kernels.portable.chunked_forward import forward
from pallas_kernels.portable.flash import backward

__all__ = ["backward", "forward"]
