"""3-D convolution through the cheapest view, with padding on each side, bias per sample, residual and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from .precision import accumulation_dtype

Triple = tuple[int, int, int]


def conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str | Sequence[str] = "zeros",
    prefix: torch.Tensor | None = None,
    channel_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    stats_groups: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """F.conv3d(F.pad(x, ...), weight, bias, stride, 0, dilation, groups) + channel_bias + residual.

    x (B, C, T, H, W); weight (C_out, C/groups, kT, kH, kW); padding int | (t, h, w) | (t0, t1, h0, h1, w0, w1) |
    "same" | "valid"; padding_mode "zeros" | "replicate", or one for each of (t, h, w); prefix (B, C, t0, H, W): the
    frames before x, in place of the front temporal padding; channel_bias (B, C_out) or (B, C_out, T_out). Returns y,
    channels_last_3d if x or the weight is, else contiguous; with `stats_groups`, (y, moments(y, stats_groups)).
    """
    stride, dilation = triple(stride), triple(dilation)
    pads = paddings(padding, tuple(weight.shape[2:]), dilation)
    channels_last = is_channels_last(x) or is_channels_last(weight)
    wide = _computed_in(x)

    h, symmetric = _pad(x.to(wide), pads, triple(padding_mode), prefix)
    h = _in_format(h, channels_last)
    bias = None if bias is None else bias.to(wide)
    if channel_bias is not None and channel_bias.dim() == 2 and channel_bias.shape[0] == 1:
        # One sample: the two biases are one vector, and the convolution adds it on its way out.
        bias = channel_bias[0].to(wide) if bias is None else bias + channel_bias[0].to(wide)
        channel_bias = None
    weight = weight.to(wide)
    if _is_matrix_product(h, weight, stride, symmetric, groups, channels_last):
        y = _matrix_product(h, weight, bias)
    else:
        apart = x.device.type == "cpu" and _records(bias)
        added = bias.detach() if apart else bias
        y = _convolve(h, weight, added, stride, symmetric, dilation, groups, channels_last)
        if apart:
            y = _BiasGradient.apply(y, bias)
    if channel_bias is not None:
        y = _add(y, channel_bias[..., None, None] if channel_bias.dim() == 3 else channel_bias[..., None, None, None])
    if residual is not None:
        y = _add(y, residual)
    y = _in_format(y.to(x.dtype), channels_last)
    return (y, moments(y, stats_groups)) if stats_groups else y


def _records(bias: torch.Tensor | None) -> bool:
    """Whether autograd alone will ask for the gradient: transforms and compilers get the convolution as it is."""
    recorded = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    return recorded and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


class _BiasGradient(torch.autograd.Function):
    """y, to which `bias` (C,) was added without autograd: gives it the sum of y's gradient.

    oneDNN sums a bias gradient in float32, one chain a thread: ten times less exact than torch's sum, and no faster.
    """

    @staticmethod
    def forward(y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return y.data  # no view of y, which an activation could not overwrite

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, grad.sum((0, 2, 3, 4))

    @staticmethod
    def jvp(ctx: Any, y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return y + bias[:, None, None, None]


@torch.no_grad()
def moments(y: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, G, 2): mean and centred sum of squares of each group of y (B, C, T, H, W), in the accumulation dtype.

    Constants to autograd: the gradient through the statistics belongs to the norm that uses them.
    """
    grouped = y.unflatten(1, (groups, y.shape[1] // groups)).to(accumulation_dtype(y.dtype))
    inside = (2, 3, 4, 5)
    mean = grouped.mean(inside, keepdim=True)
    squares = (grouped - mean).square_().sum(inside)
    return torch.stack((mean.reshape(squares.shape), squares), dim=-1)


def triple(value: int | str | Sequence[int] | Sequence[str]) -> tuple:
    """One value for each of (t, h, w)."""
    return (value,) * 3 if isinstance(value, (int, str)) else tuple(value)


def paddings(padding: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """(t0, t1, h0, h1, w0, w1) of every way to write `padding`; "same" puts an odd one behind, as torch does."""
    if padding == "valid":
        return (0,) * 6
    if padding == "same":
        both = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(p for total in both for p in (total // 2, total - total // 2))
    sides = triple(padding)
    return sides if len(sides) == 6 else tuple(p for side in sides for p in (side, side))


def output_sizes(
    sizes: Sequence[int], kernel: Sequence[int], stride: Triple, pads: Sequence[int], dilation: Triple
) -> Triple:
    """(T_out, H_out, W_out) for `sizes` (T, H, W) and `pads` as `paddings` returns them; below 1 where none fits."""
    return tuple(
        (size + pads[2 * i] + pads[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i, size in enumerate(sizes)
    )


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether the strides of a 5-D x, dense or sliced, are those of channels_last_3d and not also contiguous ones."""
    return are_channels_last(x.shape, x.stride())


def are_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """`is_channels_last` of a tensor of these sizes and strides."""
    _, channels, frames, height, width = shape
    if channels == 1 or frames * height * width == 1:
        return False
    outwards = [strides[d] for d in (1, 4, 3, 2, 0) if shape[d] > 1]
    return strides[1] == 1 and all(a <= b for a, b in pairwise(outwards))


def _in_format(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """x, copied only if it is not channels_last_3d (or contiguous) already."""
    if not channels_last:
        return x.contiguous()
    _, c, t, h, w = x.shape
    if x.stride() == (t * h * w * c, 1, h * w * c, w * c, c):
        return x
    rows = x.permute(0, 2, 3, 4, 1).contiguous()
    if rows.shape[0] == 1 and rows.stride(0) < rows.stride(1):
        # A batch of one may have any stride; torch looks at it when it decides whether a tensor is channels_last.
        rows = rows.view(rows.shape)
    return rows.permute(0, 4, 1, 2, 3)


def _narrow_dtypes() -> tuple[torch.dtype, ...]:
    """The 16-bit dtypes in which oneDNN is fast on this CPU; in the others it emulates them, or leaves them to im2col.

    It accepts bfloat16 on any AVX-512 and on some AVX2 machines, and is 4 to 80 times slower than float32 there.
    """
    if not torch.backends.mkldnn.is_available():
        return ()
    onednn = torch.ops.mkldnn
    emulated = torch.backends.cpu.get_cpu_capability().startswith("AVX") and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    bfloat16 = onednn._is_mkldnn_bf16_supported() and not emulated
    return ((torch.bfloat16,) if bfloat16 else ()) + ((torch.float16,) if onednn._is_mkldnn_fp16_supported() else ())


FAST_ON_CPU = (torch.float32, torch.float64, *_narrow_dtypes())


def beats_torch(x: torch.Tensor, dtype: torch.dtype, weight: torch.Tensor, groups: int) -> bool:
    """Whether F.conv3d on x, computed in `dtype`, would take a path of half the speed of the one taken here.

    On a CPU those are im2col, and 16-bit dtypes that oneDNN emulates or does not know.
    """
    slow = dtype not in FAST_ON_CPU or (dtype == x.dtype and _torch_takes_im2col(x, weight, groups))
    return x.device.type == "cpu" and slow


def _computed_in(x: torch.Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "cpu" and x.dtype not in FAST_ON_CPU else x.dtype


def _add(y: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    """y + term in y's dtype; where autograd does not record, on y's own memory."""
    return (y + term).to(y.dtype) if torch.is_grad_enabled() else y.add_(term)


def _pad(
    x: torch.Tensor, pads: tuple[int, ...], modes: tuple[str, str, str], prefix: torch.Tensor | None
) -> tuple[torch.Tensor, Triple]:
    """x with the padding that needs a copy, and the (t, h, w) zeros that the convolution adds by itself.

    A copy costs less than convolving a symmetric padding and dropping frames of the result (0.65-1.05 of its speed).
    """
    if prefix is not None:
        # Concatenated in (B, T, H, W, C) or as it is: torch.cat keeps a format only if every part has it.
        order = (0, 2, 3, 4, 1) if is_channels_last(x) else (0, 2, 1, 3, 4)
        back = (0, 4, 1, 2, 3) if is_channels_last(x) else (0, 2, 1, 3, 4)
        x = torch.cat((prefix.to(x.dtype).permute(order), x.permute(order)), dim=1).permute(back)
        pads = (0, *pads[1:])
    symmetric, zeros, edges = [0, 0, 0], [0] * 6, [0] * 6
    for i, mode in enumerate(modes):
        first, last = pads[2 * i : 2 * i + 2]
        if mode == "zeros" and first == last:
            symmetric[i] = first
        else:
            target = zeros if mode == "zeros" else edges
            target[4 - 2 * i : 6 - 2 * i] = first, last  # F.pad counts from the last dimension
    if any(edges):
        x = F.pad(x, edges, mode="replicate")
    if any(zeros):
        x = F.pad(x, zeros)
    return x, tuple(symmetric)


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Triple, padding: Triple,
    dilation: Triple, groups: int, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    """F.conv3d(x, weight, bias, stride, padding, dilation, groups), in the formulation that runs fastest.

    On a CPU, oneDNN runs the 3-D form as fast as a view, and without the view's 20 us; torch does not let it where a
    float32 batch of one has few rows (im2col instead, at half the speed), nor on one thread where the kernel has one
    position. There, and on other devices, the view is taken, which is free in channels_last_3d.
    """
    on_cpu = x.device.type == "cpu"
    narrow = x.dtype.itemsize == 2
    _, k_h, k_w = weight.shape[2:]
    if on_cpu and narrow and stride[2] > 1:
        x, stride, padding = _without_stride_over_one_column(x, k_w, stride, padding, dilation)
    im2col = on_cpu and _torch_takes_im2col(x, weight, groups)
    within_frames = weight.shape[2] == 1 and stride[0] == 1 and padding[0] == 0
    within_positions = k_h == k_w == 1 and stride[1:] == (1, 1) and padding[1:] == (0, 0)
    few_images = channels_last and on_cpu and x.dtype == torch.float32 and x.shape[0] * x.shape[2] < 16
    if within_frames and within_positions and groups == 1 and few_images:
        # On one thread torch takes im2col for 1x1 kernels on fewer than 16 images.
        return F.linear(x.permute(0, 2, 3, 4, 1), weight.flatten(1), bias).permute(0, 4, 1, 2, 3)
    views = not (channels_last and on_cpu) or im2col or not (narrow or (x.dtype == torch.float32 and k_h * k_w > 1))
    if views and within_frames:
        # In contiguous tensors the view costs a copy of the output, which im2col outweighs from a few channels on.
        if channels_last or (im2col and weight[0].numel() > 2 * weight.shape[0]):
            return _frames(x, weight, bias, stride, padding, dilation, groups)
    elif views and within_positions:
        return _positions(x, weight, bias, stride, padding, dilation, groups, channels_last)
    elif im2col:
        return _unfolded_in_time(x, weight, bias, stride, padding, dilation)
    if on_cpu and narrow and any(n < k for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)):
        # oneDNN's 16-bit 3-D weight gradient is wrong, and writes out of bounds, where a padded input is smaller than
        # the kernel (2 frames, kernel 3): the 2-D one is not, nor is an input that has its padding already.
        x, padding = F.pad(x, [p for side in reversed(padding) for p in (side, side)]), (0, 0, 0)
    return F.conv3d(x, weight, bias, stride, padding, dilation, groups)


def _without_stride_over_one_column(
    x: torch.Tensor, k_w: int, stride: Triple, padding: Triple, dilation: Triple
) -> tuple[torch.Tensor, Triple, Triple]:
    """The same convolution with stride 1 along W where W_out = 1.

    oneDNN leaves parts of a strided 16-bit result unwritten there (pytorch issue 169688).
    """
    extent = dilation[2] * (k_w - 1) + 1
    if x.shape[4] + 2 * padding[2] - extent >= stride[2]:
        return x, stride, padding
    column = F.pad(x, (padding[2], padding[2]))[..., :extent]
    return column, (*stride[:2], 1), (*padding[:2], 0)


def _torch_takes_im2col(x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    """torch's own condition: it looks at the first four sizes only."""
    batch, channels, frames, height = x.shape[:4]
    large_kernel = weight.shape[-2] > 3 and weight.shape[-1] > 3
    small = batch == 1 and channels * frames * height <= 20480
    return x.dtype == torch.float32 and groups == 1 and small and not large_kernel


def _is_matrix_product(
    x: torch.Tensor, weight: torch.Tensor, stride: Triple, padding: Triple, groups: int, channels_last: bool
) -> bool:
    """Whether it is 1x1x1 on a contiguous x on a CPU, which oneDNN's convolution reorders first.

    As a matrix product bfloat16 is 1.3 to 2.3 times as fast, float32 1.0 to 1.4 times, and with backward 1.1 to 1.8; a
    single sample, and 320 channels, are not.
    """
    plain = all(k == 1 for k in weight.shape[2:]) and stride == (1, 1, 1) and padding == (0, 0, 0) and groups == 1
    few_channels = x.dtype == torch.float32 and x.shape[0] > 1 and weight.numel() <= 32768
    fast = x.device.type == "cpu" and (x.dtype == torch.bfloat16 or few_channels)
    return plain and fast and not channels_last


def _matrix_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A 1x1x1 convolution of a contiguous x as one matrix product per sample."""
    matrix, columns = weight.flatten(1).expand(x.shape[0], -1, -1), x.flatten(2)
    y = torch.bmm(matrix, columns) if bias is None else torch.baddbmm(bias[:, None], matrix, columns)
    return y.unflatten(2, x.shape[2:])


def _frames(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Triple, padding: Triple,
    dilation: Triple, groups: int,
) -> torch.Tensor:  # fmt: skip
    """A (1, kH, kW) kernel as a 2-D convolution of B*T frames: a free view in channels_last_3d."""
    images = x.transpose(1, 2).flatten(0, 1)
    y = F.conv2d(images, weight[:, :, 0], bias, stride[1:], padding[1:], dilation[1:], groups)
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def _positions(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Triple, padding: Triple,
    dilation: Triple, groups: int, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    """A (kT, 1, 1) kernel as a 2-D convolution over (T, H*W): a free view in either format."""
    # channels_last is flattened as (B, T, H*W, C): x.flatten(3) gives a batch of one another stride, see _in_format.
    images = x.permute(0, 2, 3, 4, 1).flatten(2, 3).permute(0, 3, 1, 2) if channels_last else x.flatten(3)
    y = F.conv2d(images, weight[..., 0], bias, (stride[0], 1), (padding[0], 0), (dilation[0], 1), groups)
    return y.unflatten(3, x.shape[3:])


def _unfolded_in_time(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Triple, padding: Triple,
    dilation: Triple,
) -> torch.Tensor:  # fmt: skip
    """A (kT, kH, kW) kernel as a (1, kH, kW) one on kT shifted copies of the frames, stacked as channels."""
    k_t = weight.shape[2]
    x = F.pad(x, (0, 0, 0, 0, padding[0], padding[0])) if padding[0] else x
    last = x.shape[2] - dilation[0] * (k_t - 1)
    shifted = [x[:, :, i * dilation[0] : i * dilation[0] + last : stride[0]] for i in range(k_t)]
    flat_weight = weight.transpose(1, 2).flatten(1, 2).unsqueeze(2)
    return _frames(torch.cat(shifted, 1), flat_weight, bias, stride, padding, dilation, groups=1)
