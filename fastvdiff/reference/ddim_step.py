"""One DDIM step (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16) with guidance, thresholding and noise.

The parts that a scheduler or a loss also needs on their own (guidance, the conversion of a prediction, dynamic
thresholding) are functions of their own here, so that each formula is written once.
"""

import math

import torch

from .philox import philox_normal
from .precision import accumulation_dtype

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def ddim_step(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    alpha_t: float | torch.Tensor,
    alpha_prev: float | torch.Tensor,
    uncond_output: torch.Tensor | None = None,
    guidance_scale: float | torch.Tensor = 1.0,
    guidance_rescale: float = 0.0,
    prediction_type: str = "epsilon",
    eta: float = 0.0,
    noise: torch.Tensor | None = None,
    noise_seed: torch.Tensor | None = None,
    clip_sample: float | None = None,
    dynamic_threshold: tuple[float, float] | None = None,
    use_clipped_model_output: bool = False,
    return_pred_original: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x_prev = sqrt(a_prev) x0 + sqrt(1 - a_prev - sigma^2) eps + sigma z, in the accumulation dtype, rounded once.

    sample, model_output, uncond_output, noise (B, C, *spatial); alpha_t, alpha_prev a float, 0-dim or (B,);
    noise_seed int64 (1,). Returns (x_prev, x0 after thresholding or clipping, or None).
    """
    wide = accumulation_dtype(sample.dtype)
    x, output = sample.to(wide), model_output.to(wide)
    if uncond_output is not None:
        output = guide(output, uncond_output.to(wide), guidance_scale, guidance_rescale)

    at, ap = alpha_column(alpha_t, x.dim()), alpha_column(alpha_prev, x.dim())
    original, epsilon = original_and_epsilon(prediction_type, x, output, at.sqrt().to(wide), (1 - at).sqrt().to(wide))
    if dynamic_threshold is not None:
        original = threshold(original, *dynamic_threshold)
    elif clip_sample is not None:
        original = original.clamp(-clip_sample, clip_sample)
    if use_clipped_model_output:
        epsilon = (x - at.sqrt().to(wide) * original) / (1 - at).sqrt().to(wide)

    sigma = eta * ((1 - ap) / (1 - at) * (1 - at / ap)).clamp(min=0).sqrt() if eta > 0 else torch.zeros_like(ap)
    direction = (1 - ap - sigma**2).clamp(min=0).sqrt()
    prev = ap.sqrt().to(wide) * original + direction.to(wide) * epsilon
    if eta > 0:
        z = noise.to(wide) if noise is not None else philox_normal(x.shape, noise_seed, wide)
        prev = prev + sigma.to(wide) * z
    return prev.to(sample.dtype), original.to(sample.dtype) if return_pred_original else None


def alpha_column(alpha: float | torch.Tensor, ndim: int) -> torch.Tensor:
    """A cumulative product as float64, a (B,) tensor with trailing ones up to `ndim` dimensions.

    The few values in float64 keep 1 - a_prev - sigma^2 exact where a is close to 1.
    """
    alpha = torch.as_tensor(alpha, dtype=torch.float64)
    return alpha.reshape(alpha.shape + (1,) * (ndim - 1)) if alpha.dim() else alpha


def guide(
    output: torch.Tensor, uncond_output: torch.Tensor, scale: float | torch.Tensor, rescale: float = 0.0
) -> torch.Tensor:
    """Classifier-free guidance u + w (c - u) (arXiv:2207.12598), its spread pulled back to the conditional one's.

    `rescale` mixes the guided output brought to the standard deviation of `output` (unbiased, over everything but the
    batch) with the guided one: arXiv:2305.08891, section 3.4.
    """
    if isinstance(scale, torch.Tensor):
        scale = scale_over_frames(scale, output.dim()).to(output.dtype)
    guided = uncond_output + scale * (output - uncond_output)
    if rescale > 0:
        rest = tuple(range(1, output.dim()))
        ratio = output.std(rest, keepdim=True) / guided.std(rest, keepdim=True)
        guided = guided * (rescale * ratio + (1 - rescale))
    return guided


def scale_over_frames(scale: torch.Tensor, ndim: int) -> torch.Tensor:
    """A guidance scale (B, 1), (1, T) or (B, T) against (B, C, T, *spatial); 0-dim stays as it is."""
    if scale.dim() == 0:
        return scale
    return scale.reshape(scale.shape[0], 1, scale.shape[1], *(1,) * (ndim - 3)) if ndim > 2 else scale


def original_and_epsilon(
    prediction_type: str, x: torch.Tensor, output: torch.Tensor, signal: torch.Tensor, spread: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and epsilon from what the model predicts at x = signal x0 + spread epsilon.

    `prediction_type` is "epsilon", "sample" or "v_prediction" (v = signal epsilon - spread x0, arXiv:2202.00512).
    """
    if prediction_type == "epsilon":
        return (x - spread * output) / signal, output
    if prediction_type == "sample":
        return output, (x - signal * output) / spread
    return signal * x - spread * output, signal * output + spread * x


def threshold(original: torch.Tensor, ratio: float, max_value: float) -> torch.Tensor:
    """Dynamic thresholding (Imagen, arXiv:2205.11487): x0 clamped to +-s and divided by s.

    s is the `ratio` quantile of |x0| over each sample, between 1 and `max_value`.
    """
    if original.numel() == 0:
        return original
    s = magnitude_quantile(original, ratio).clamp(min=1, max=max_value)
    s = s.reshape(-1, *(1,) * (original.dim() - 1))
    return original.clamp(-s, s) / s


def magnitude_quantile(values: torch.Tensor, ratio: float) -> torch.Tensor:
    """The `ratio` quantile of |values| over everything but the batch, between neighbours linearly: (B,).

    torch.quantile without its limit of 16 million elements; a NaN makes its sample's quantile NaN, as there.
    """
    flat = values.abs().flatten(1)
    position = ratio * (flat.shape[1] - 1)
    below = math.floor(position)
    low = flat.kthvalue(below + 1, dim=1).values
    high = flat.kthvalue(min(below + 2, flat.shape[1]), dim=1).values
    between = torch.where(low == high, low, low + (position - below) * (high - low))
    return torch.where(flat.isnan().any(dim=1), torch.nan, between)
