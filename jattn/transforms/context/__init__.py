"""Sequences over several devices, by kernels that know of one."""

from jattn.transforms.context.plan import plan_of
from jattn.transforms.context.spread import backward, forward, past_zeroed
from jattn.transforms.context.tangents import backward_tangent, formula, tangent

__all__ = [
    "backward",
    "backward_tangent",
    "formula",
    "forward",
    "past_zeroed",
    "plan_of",
    "tangent",
]
