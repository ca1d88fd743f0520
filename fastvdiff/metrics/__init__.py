"""What a sampled video shows, measured on its pixels."""

from .proportions import wilson_interval
from .shapes import ShapeReading, read_shape_clip

__all__ = ["ShapeReading", "read_shape_clip", "wilson_interval"]
