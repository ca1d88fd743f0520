"""Fast video diffusion U-Nets: fused kernels as functionals, drop-in modules, models, sampling and training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastvdiff._version import __version__

if TYPE_CHECKING:
    from fastvdiff import data, diffusion, models, nn, ops, sampling, swap, text, training
    from fastvdiff.dispatch import explain, use_impl
    from fastvdiff.models import VideoUNet, VideoUNetConfig
    from fastvdiff.swap import SwapReport, swap_kernels, swap_scheduler
    from fastvdiff.tuning import tune

__all__ = [
    "SwapReport",
    "VideoUNet",
    "VideoUNetConfig",
    "__version__",
    "data",
    "diffusion",
    "explain",
    "models",
    "nn",
    "ops",
    "sampling",
    "swap",
    "swap_kernels",
    "swap_scheduler",
    "text",
    "training",
    "tune",
    "use_impl",
]

# Public names resolve on first use, so that importing fastvdiff costs little beyond torch.
_HOMES = {
    "SwapReport": "fastvdiff.swap",
    "VideoUNet": "fastvdiff.models",
    "VideoUNetConfig": "fastvdiff.models",
    "explain": "fastvdiff.dispatch",
    "swap_kernels": "fastvdiff.swap",
    "swap_scheduler": "fastvdiff.swap",
    "tune": "fastvdiff.tuning",
    "use_impl": "fastvdiff.dispatch",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in __all__:
        value = import_module(f"fastvdiff.{name}")
    else:
        raise AttributeError(f"module 'fastvdiff' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
