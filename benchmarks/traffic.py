"""Bytes and operations of every op: the one definition that the roofline and the measured GB/s share.

`moved` follows the kernels' own cards (their Traffic lines); `least` is what any kernel must move, each input read once
and each result written once. "T" is the bytes of one activation tensor. Parameters count where they are not negligible.
Norms and the sampler's step run on the vector units, attention and convolutions on the matrix units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

BF16 = 2


@dataclass(frozen=True)
class Work:
    """What one call does: bytes through device memory and floating-point operations.

    `rate` is the share of the matrix units' bf16 rate that they have for the call's dtype: tf32's is half of it.
    """

    moved: int
    least: int
    flops: int
    matrix: bool
    rate: float = 1.0

    @property
    def intensity(self) -> float:
        """Operations per byte moved."""
        return self.flops / self.moved


def group_norm_silu(shape: tuple[int, ...], *, training: bool = False, size: int = BF16) -> Work:
    """Forward 3T: statistics read x, the apply pass reads it again and writes y. Backward 5T: x and dy twice, dx once.

    A sample that fits on chip is read once: 2T and 3T.
    """
    elements = math.prod(shape)
    tensor = elements * size
    # Per element: 3 for the statistics, 4 for normalisation and modulation, 4 for SiLU; the backward about twice that.
    forward, backward = 11 * elements, 22 * elements
    if training:
        return Work(8 * tensor, 5 * tensor, forward + backward, False)
    return Work(3 * tensor, 2 * tensor, forward, False)


def temporal_attention(sequences: int, frames: int, dim: int, *, training: bool = False, size: int = BF16) -> Work:
    """Forward 4T: q, k, v and y. Backward 7T: q, k, v and dy read, dq, dk and dv written, the scores computed again.

    `sequences` counts heads too: B * S * heads rows of (T, D). Two products forward, five backward.
    """
    tensor, product = sequences * frames * dim * size, 2 * sequences * frames * frames * dim
    moved = (11 if training else 4) * tensor
    return Work(moved, moved, (7 if training else 2) * product, True)


def temporal_attention_block(
    batch: int, channels: int, frames: int, positions: int, inner: int, *, training: bool = False, size: int = BF16
) -> Work:
    """Forward 2T and the four weights. Backward 3T: x and dy read, dx written; weights read, their gradients written.

    The backward computes q, k, v and the attention again: 3 of 4 projections and both products, then two products for
    each projection's gradients and four for attention's.
    """
    rows = batch * frames * positions
    tensor, weights = rows * channels * size, 4 * channels * inner * size
    projection, product = 2 * rows * channels * inner, 2 * rows * frames * inner
    moved, flops = 2 * tensor + weights, 4 * projection + 2 * product
    if training:
        moved, flops = moved + 3 * tensor + 2 * weights, flops + 11 * projection + 6 * product
    return Work(moved, moved, flops, True)


def geglu(rows: int, width: int, *, training: bool = False, size: int = BF16) -> Work:
    """Forward 3N, N of the result: both halves read, it written. Backward 5N: they and dy read, two gradients written.

    Per element the distribution function is about 30 operations, in the backward with the density 40.
    """
    elements = rows * width
    moved = (8 if training else 3) * elements * size
    return Work(moved, moved, (75 if training else 32) * elements, False)


def ddim_step(
    shape: tuple[int, ...], *, original: bool = True, noise: bool = False, threshold: bool = False, size: int = BF16
) -> Work:
    """4N: sample and two predictions read, the next sample written; x0 and a noise tensor one more each.

    Dynamic thresholding reads the three inputs twice more for its quantile where that lies between its bounds. Noise
    drawn inside moves nothing.
    """
    elements = math.prod(shape)
    tensors = 4 + original + noise
    moved = (tensors + 6 * threshold) * elements * size
    return Work(moved, tensors * elements * size, 16 * elements, False)


def conv3d(
    batch: int, in_channels: int, out_channels: int, thw: tuple[int, ...], kernel: tuple[int, ...],
    *, stride: tuple[int, ...] = (1, 1, 1), training: bool = False, size: int = BF16,
) -> Work:  # fmt: skip
    """Input, weight and output once; the backward is two more convolutions. Padded by half of an odd kernel."""
    rows_in, rows_out = batch * math.prod(thw), batch * math.prod(strided(thw, stride))
    weight = in_channels * out_channels * math.prod(kernel)
    bytes_in, bytes_out, bytes_weight = rows_in * in_channels * size, rows_out * out_channels * size, weight * size
    moved, flops = bytes_in + bytes_out + bytes_weight, 2 * rows_out * weight
    if training:  # data gradient: dy, weight -> dx; weight gradient: x, dy -> dweight
        moved, flops = moved + 2 * bytes_out + 2 * bytes_in + 2 * bytes_weight, 3 * flops
    return Work(moved, moved, flops, True, 1.0 if size == BF16 else 0.5)


def strided(thw: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """(T, H, W) of what a convolution of this stride makes, padded by half of an odd kernel."""
    return tuple((n - 1) // s + 1 for n, s in zip(thw, stride, strict=True))


def with_epilogue(convolution: Work, result: int, *, training: bool) -> Work:
    """The residual is read in the epilogue; in the backward dy once more, for its sums. `result`: bytes of y."""
    more = (2 if training else 1) * result
    return replace(convolution, moved=convolution.moved + more, least=convolution.least + more)


def then_norm(convolution: Work, result: int, *, training: bool) -> Work:
    """A norm and SiLU after it that know their statistics: y read, the activation written; the backward's 5T."""
    return replace(convolution, moved=convolution.moved + (7 if training else 2) * result)


def norm_before(convolution: Work, tensor: int, *, training: bool) -> Work:
    """A norm and SiLU of x, whose statistics are known, on its way in: no traffic forward. `tensor`: bytes of x.

    The backward makes the activation again (2T) and goes through the norm (5T).
    """
    if not training:
        return convolution
    return replace(convolution, moved=convolution.moved + 7 * tensor)


def resnet_block(
    batch: int, channels: int, thw: tuple[int, ...], kernel: tuple[int, ...], *, training: bool = False
) -> Work:
    """Two convolutions of as many channels, a norm and SiLU before each, channel bias, residual: 5T forward.

    The first reads x and writes h, the second reads h and x and writes y; the statistics are known beforehand.
    """
    tensor = batch * channels * math.prod(thw) * BF16
    one = norm_before(conv3d(batch, channels, channels, thw, kernel, training=training), tensor, training=training)
    last = with_epilogue(one, tensor, training=training)
    shortcut = 3 * tensor if training else 0  # dx of both ways is added
    weights = 2 * channels * channels * math.prod(kernel) * BF16
    least = (2 + 2 * training) * tensor + (1 + training) * weights
    return Work(one.moved + last.moved + shortcut, least, one.flops + last.flops, True)
