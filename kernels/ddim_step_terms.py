"""The arithmetic of a DDIM step: what every kernel of it computes for one sample and for a tile of its elements.

Products and sums are spelled as fused multiply-adds where the compiler could choose: the passes over x0 (histograms,
update) then see the same bits.
"""

import triton
import triton.language as tl

EPSILON = tl.constexpr(0)
SAMPLE = tl.constexpr(1)


@triton.jit
def _alpha(pointer, stride, value, b):
    if pointer is None:
        return tl.full((), value, tl.float64)
    else:
        return tl.load(pointer + b * stride).to(tl.float64)


@triton.jit
def alphas_of(alpha_t_ptr, alpha_prev_ptr, alpha_t, alpha_prev, stride_at, stride_ap, b):
    """The two cumulative products of sample b, float64: their differences need it, what follows from those does not."""
    a = _alpha(alpha_t_ptr, stride_at, alpha_t, b)
    return a, _alpha(alpha_prev_ptr, stride_ap, alpha_prev, b)


@triton.jit
def coefficients(a):
    """sqrt(a), sqrt(1 - a) and their reciprocals, float32."""
    signal = tl.sqrt_rn(a.to(tl.float32))
    spread = tl.sqrt_rn((1 - a).to(tl.float32))
    return signal, spread, tl.div_rn(1.0, signal), tl.div_rn(1.0, spread)


@triton.jit
def update_coefficients(a, following, eta, NOISY: tl.constexpr):
    """sqrt(a'), sqrt(1 - a' - sigma^2) and sigma from the two float64 cumulative products.

    With sigma^2 = eta^2 (1 - a') (a' - a) / ((1 - a) a') the radicand 1 - a' - sigma^2 is
    (1 - a') ((1 - eta^2) (a' - a) + a (1 - a')) / ((1 - a) a'), where nothing cancels but 1 - eta^2.
    """
    remaining = (1 - following).to(tl.float32)
    radicand = remaining
    sigma = 0.0
    if NOISY:
        eta = tl.full((), eta, tl.float64)
        gained = (following - a).to(tl.float32)
        whole = (1 - a).to(tl.float32) * following.to(tl.float32)
        variance = tl.div_rn((eta * eta).to(tl.float32) * remaining * gained, whole)
        kept = tl.div_rn(
            remaining * tl.fma((1 - eta * eta).to(tl.float32), gained, a.to(tl.float32) * remaining), whole
        )
        radicand = tl.where(variance <= 0, remaining, kept)
        sigma = tl.sqrt_rn(tl.where(variance < 0, 0.0, variance))
    of_epsilon = tl.sqrt_rn(tl.where(radicand < 0, 0.0, radicand))
    return tl.sqrt_rn(following.to(tl.float32)), of_epsilon, sigma


@triton.jit
def guidance_of_tile(
    guidance_ptr, guidance, stride_gb, stride_gt, run, frames, b, first, index,
    RUN_COVERS_TILE: tl.constexpr,
):  # fmt: skip
    """The guidance scale at elements first + index of sample b: a scalar, or one for each where frames differ.

    A frame's elements lie in runs of `run`; with RUN_COVERS_TILE a tile meets one boundary at most.
    """
    if guidance_ptr is None:
        return guidance
    elif run is None:
        return tl.load(guidance_ptr + b * stride_gb).to(tl.float32)
    else:
        row = first // run
        base = guidance_ptr + b * stride_gb
        if RUN_COVERS_TILE:
            here = tl.load(base + row % frames * stride_gt).to(tl.float32)
            there = tl.load(base + (row + 1) % frames * stride_gt).to(tl.float32)
            return tl.where(index < (row + 1) * run - first, here, there)
        else:
            rows = row + (index + (first - row * run).to(tl.int32)) // run
            return tl.load(base + rows % frames * stride_gt).to(tl.float32)


@triton.jit
def guided(output_ptr, uncond_ptr, offset, index, mask, scale):
    """u + w (c - u) at offset + index, or c where there is no u; float32."""
    output = tl.load(output_ptr + offset + index, mask=mask, other=0.0).to(tl.float32)
    if uncond_ptr is None:
        return output
    else:
        uncond = tl.load(uncond_ptr + offset + index, mask=mask, other=0.0).to(tl.float32)
        return tl.fma(scale, output - uncond, uncond)


@triton.jit
def original_of(x, output, signal, spread, per_signal, PREDICTION: tl.constexpr):
    """x0 from what the model predicts."""
    if PREDICTION == EPSILON:
        return tl.fma(-spread, output, x) * per_signal
    elif PREDICTION == SAMPLE:
        return output
    else:
        return tl.fma(signal, x, -spread * output)


@triton.jit
def epsilon_of(x, output, signal, spread, per_spread, PREDICTION: tl.constexpr):
    """Epsilon from what the model predicts."""
    if PREDICTION == EPSILON:
        return output
    elif PREDICTION == SAMPLE:
        return tl.fma(-signal, output, x) * per_spread
    else:
        return tl.fma(signal, output, spread * x)


@triton.jit
def gradient_of_epsilon(g, signal, spread, per_spread, PREDICTION: tl.constexpr):
    """What epsilon's gradient g gives to x and to the guided output."""
    if PREDICTION == EPSILON:
        return tl.zeros_like(g), g
    elif PREDICTION == SAMPLE:
        return per_spread * g, -signal * per_spread * g
    else:
        return spread * g, signal * g


@triton.jit
def gradient_of_original(g, signal, spread, per_signal, PREDICTION: tl.constexpr):
    """What x0's gradient g gives to x and to the guided output."""
    if PREDICTION == EPSILON:
        return per_signal * g, -spread * per_signal * g
    elif PREDICTION == SAMPLE:
        return tl.zeros_like(g), g
    else:
        return signal * g, -spread * g
