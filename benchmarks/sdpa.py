"""torch's attention backends by name: as a user calls them, and their kernels alone on inputs made ready before."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import eager
from benchmarks.gpu_case import Baseline, Tensors

BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
CORE = " core"  # ends the name of a provider whose inputs are copied and turned before the clock starts


def baselines(heads: int) -> dict[str, Baseline]:
    """Every backend twice: with the copies that bring frames together, and without."""
    made, ready = {}, partial(_ready, heads)
    for name, backend in BACKENDS.items():
        made[name] = Baseline(partial(_with_copies, backend, heads))
        made[name + CORE] = Baseline(partial(_core, backend), ready)
    return made


def _with_copies(backend: SDPBackend, heads: int, *tensors: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return eager.temporal_attention(*tensors, heads=heads)


def _core(backend: SDPBackend, q: Any, k: Any, v: Any, attn_bias: Any = None) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias)


def _ready(heads: int, tensors: Tensors) -> Tensors:
    """(q, k, v[, bias, cos, sin]) of a case as (q, k, v[, bias]), contiguous (B*H*W, heads, T, D)."""
    q, k, v, *rest = tensors
    ready = eager.frames_last(q, k, v, *rest[1:], heads=heads)
    return (*(t.contiguous() for t in ready), *rest[:1])
