"""Drop-in modules: the constructor arguments and state_dict keys of torch.nn and diffusers, on the fused ops."""

from .checkpoint import checkpoint
from .conv3d import Conv3d, FactorizedConv3d
from .cross_attention import CrossAttention
from .cross_frame_attention import CrossFrameAttention
from .feed_forward import GEGLU, FeedForward
from .frame_embedding import FrameEmbedding
from .group_norm_silu import GroupNormSiLU
from .relative_position_bias import RelativePositionBias
from .resampling import Downsample3d, Upsample3d
from .resnet_block3d import ResnetBlock3d
from .rotary import rotary_table
from .spatial_attention import SpatialAttention
from .temporal_attention import TemporalAttention
from .timestep_embedding import TimestepEmbedding, timestep_embedding

__all__ = [
    "GEGLU",
    "Conv3d",
    "CrossAttention",
    "CrossFrameAttention",
    "Downsample3d",
    "FactorizedConv3d",
    "FeedForward",
    "FrameEmbedding",
    "GroupNormSiLU",
    "RelativePositionBias",
    "ResnetBlock3d",
    "SpatialAttention",
    "TemporalAttention",
    "TimestepEmbedding",
    "Upsample3d",
    "checkpoint",
    "rotary_table",
    "timestep_embedding",
]
