"""Sequences over several devices, by kernels that know of one."""

from jattn.transforms.context.plan import plan_of
from jattn.transforms.context.spread import backward, forward, past_zeroed

__all__ = ["backward", "forward", "past_zeroed", "plan_of"]
