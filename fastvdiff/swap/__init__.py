"""Fast kernels behind modules that somebody else wrote: same parameters, same keys, same hooks, same numbers."""

from .report import SwapReport
from .scheduler import swap_scheduler
from .swapping import swap_kernels
from .target import Target, register

__all__ = ["SwapReport", "Target", "register", "swap_kernels", "swap_scheduler"]
