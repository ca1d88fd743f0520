"""conv3d on clusters of blocks (csrc/cuda/conv3d_sm90_cluster.cu), for all else as `conv3d_cuda_sm90`."""

from __future__ import annotations

from functools import partial

from . import conv3d_cuda_sm90 as alone
from .conv3d_cuda_sm90 import Geometry, weight_gradient

__all__ = ["Geometry", "forward", "input_gradient", "plans", "weight_gradient"]

_KERNEL = "cuda_conv3d_sm90_cluster"
forward = partial(alone.forward, kernel=_KERNEL)
input_gradient = partial(alone.input_gradient, kernel=_KERNEL)
plans = partial(alone.plans, launched=_KERNEL)
