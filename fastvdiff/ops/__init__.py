"""Public functionals: they read like `torch.nn.functional` plus what is fused."""

from fastvdiff import dispatch

from .conv3d import conv3d
from .ddim_step import ddim_step
from .geglu import geglu
from .group_norm_silu import group_norm_silu
from .norm_silu_conv3d import norm_silu_conv3d
from .temporal_attention import temporal_attention
from .temporal_attention_block import temporal_attention_block

dispatch.check_environment()

__all__ = [
    "conv3d",
    "ddim_step",
    "geglu",
    "group_norm_silu",
    "norm_silu_conv3d",
    "temporal_attention",
    "temporal_attention_block",
]
