"""The standard shapes: the levels of the video U-Nets and autoencoders that the kernels are made for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """One resolution of a network: the clip's size there, its channels and its temporal attention's heads."""

    name: str
    batch: int
    frames: int
    height: int
    width: int
    channels: int
    heads: int = 0
    dim: int = 0

    @property
    def clip(self) -> tuple[int, int, int, int, int]:
        """(B, C, T, H, W)."""
        return (self.batch, self.channels, self.frames, self.height, self.width)

    @property
    def inner(self) -> int:
        """Width of q, k and v."""
        return self.heads * self.dim

    @property
    def sequences(self) -> int:
        """Rows of attention: positions of all samples, times heads."""
        return self.batch * self.height * self.width * self.heads


SVD = (
    Level("svd-l0", 2, 25, 72, 128, 320, 5, 64),
    Level("svd-l1", 2, 25, 36, 64, 640, 10, 64),
    Level("svd-l2", 2, 25, 18, 32, 1280, 20, 64),
    Level("svd-l3", 2, 25, 9, 16, 1280, 20, 64),
)
ANIMATEDIFF = (
    Level("animatediff-l0", 2, 16, 64, 64, 320, 8, 40),
    Level("animatediff-l1", 2, 16, 32, 32, 640, 8, 80),
    Level("animatediff-l2", 2, 16, 16, 16, 1280, 8, 160),
    Level("animatediff-l3", 2, 16, 8, 8, 1280, 8, 160),
)
VDM = (
    Level("vdm-l0", 4, 16, 64, 64, 64, 8, 32),
    Level("vdm-l1", 4, 16, 32, 32, 128, 8, 32),
    Level("vdm-l3", 4, 16, 8, 8, 512, 8, 32),
)
VAE = (
    Level("vae-1x128x20x256x256", 1, 20, 256, 256, 128),
    Level("vae-1x512x8x45x80", 1, 8, 45, 80, 512),
    Level("vae-1x512x16x90x160", 1, 16, 90, 160, 512),
)
