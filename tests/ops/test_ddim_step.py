"""ddim_step: every feature against float64, gradients, layouts, noise from a seed, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch._dynamo.testing import CompileCounter

from fastvdiff import native
from fastvdiff.ops import ddim_step
from fastvdiff.reference.ddim_step import magnitude_quantile
from fastvdiff.reference.philox import philox_4x32, philox_normal
from tests.closeness import hold
from tests.ops.drawn_ddim_step import LAYOUTS, NARROW, calls, channels_last, contiguous, transposed


@settings(max_examples=330)
@given(calls())
def test_holds_to_float64(call: tuple[tuple[Any, ...], dict[str, Any], torch.dtype]) -> None:
    args, options, dtype = call
    outputs = hold(ddim_step, *args, impl="cpu", dtype=dtype, **options)
    for output in outputs:
        if output is not None:
            assert output.dtype == dtype
            assert output.stride() == torch.empty_like(args[0]).stride()


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_every_instruction_set_over_many_blocks(isa: str, dtype: torch.dtype, layout: Any) -> None:
    x, out, uncond = (layout(torch.randn(2, 4, 5, 43, 61).to(dtype)) for _ in range(3))
    with native.use_isa(isa):
        hold(
            ddim_step, x, out, torch.tensor([0.2, 0.5]), 0.7, impl="cpu", dtype=dtype, uncond_output=uncond,
            guidance_scale=torch.rand(2, 5) * 5, guidance_rescale=0.5, dynamic_threshold=(0.99, 2.0), eta=1.0,
            noise_seed=torch.tensor([2**62 + 3]),
        )  # fmt: skip


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_results_that_bypass_the_caches(isa: str, dtype: torch.dtype) -> None:
    """More bytes than the kernel's limit for plain stores; frames and samples begin between two vectors' addresses."""
    x, out, uncond = (torch.randn(2, 3, 7, 257, 263).to(dtype) for _ in range(3))
    with native.use_isa(isa):
        hold(
            ddim_step, x, out, 0.4, 0.7, impl="cpu", dtype=dtype, uncond_output=uncond,
            guidance_scale=torch.rand(2, 7) * 5, clip_sample=1.0,
        )  # fmt: skip
        leaves = [t.clone().requires_grad_() for t in (x, out, uncond)]
        hold(
            ddim_step, *leaves[:2], 0.3, 0.6, impl="cpu", dtype=dtype, uncond_output=leaves[2], guidance_scale=3.0,
            clip_sample=1.0, use_clipped_model_output=True,
        )  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 4, 3, 5, 7), (2, 4, 0, 5, 7), (0, 3, 8, 8)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    for impl in ("cpu", "reference"):
        prev, original = ddim_step(
            x, torch.randn(shape), 0.5, 0.7, eta=1.0, noise_seed=torch.tensor([1]), clip_sample=1.0, impl=impl
        )
        assert prev.shape == original.shape == shape
        assert torch.autograd.grad(prev.sum() + original.sum(), x)[0].shape == shape


def test_noise_from_a_seed_does_not_depend_on_the_layout() -> None:
    """A seed's noise belongs to logical positions, so the layout does not change it."""
    x, out, seed = torch.randn(2, 3, 5, 7, 11), torch.randn(2, 3, 5, 7, 11), torch.tensor([77])
    expected = ddim_step(x, out, 0.5, 0.7, eta=1.0, noise_seed=seed, impl="cpu")[0]
    for layout in LAYOUTS:
        got = ddim_step(layout(x), layout(out), 0.5, 0.7, eta=1.0, noise_seed=seed, impl="cpu")[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


# ---- noise from a seed ----------------------------------------------------------------------------------------------


def signed(low: int, high: int) -> int:
    """Two 32-bit words as the int64 that holds them."""
    value = high << 32 | low
    return value - 2**64 if value >= 2**63 else value


def test_philox_known_answers() -> None:
    """Words published with the generator, for the counters that two words can hold."""
    words = philox_4x32(torch.tensor([0]), torch.tensor([0]))[0].tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def native_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The kernel's own normals: at alpha_t = 0 and alpha_prev = 1/2 a step of zeros is sqrt(1/2) noise."""
    zeros = torch.zeros(shape)
    step = ddim_step(
        zeros, zeros, 0.0, 0.5, prediction_type="v_prediction", eta=1.0, noise_seed=torch.tensor([seed]), impl="cpu"
    )
    return step[0] / math.sqrt(0.5)


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("seed", [0, 1, -1, signed(0xDEADBEEF, 0x12345678), -(2**63)])
def test_normals_agree_with_the_reference(isa: str, seed: int) -> None:
    shape = (1, 3, 5, 37, 41)
    with native.use_isa(isa):
        got = native_noise(shape, seed)
    expected = philox_normal(shape, torch.tensor([seed]), torch.float64)
    assert (got - expected).abs().max() < 1e-6 * 1.5  # the step itself rounds twice


def test_normals_are_standard() -> None:
    z = native_noise((1, 4, 8, 128, 128), 3).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 6 / math.sqrt(n)
    assert abs((z**3).mean()) < 16 / math.sqrt(n)
    assert abs((z**4).mean() - 3) < 40 / math.sqrt(n)
    flat = z.flatten()
    for lag in (1, 2, 3, 4, 128):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 / math.sqrt(n)
    tail = (z.abs() > 3).double().mean()
    assert abs(tail - 2.6998e-3) < 5 * math.sqrt(2.7e-3 / n)


def test_seed_is_read_when_the_step_runs() -> None:
    x, seed = torch.zeros(1, 1, 2, 4, 4), torch.tensor([1])
    first = ddim_step(x, x, 0.5, 0.7, eta=1.0, noise_seed=seed, impl="cpu")[0]
    seed.fill_(2)
    assert not torch.equal(first, ddim_step(x, x, 0.5, 0.7, eta=1.0, noise_seed=seed, impl="cpu")[0])


# ---- quantile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 100, 70001])
def test_quantile_is_torch_quantile(ratio: float, count: int) -> None:
    values = torch.randn(3, 1, count, 1, 1) * 4
    expected = values.double().abs().flatten(1).quantile(ratio, dim=1)
    torch.testing.assert_close(magnitude_quantile(values.double(), ratio), expected)
    # The kernel's: x0 = the output, so that the threshold shows in what comes back.
    got = ddim_step(values, values, 0.5, 0.7, prediction_type="sample", dynamic_threshold=(ratio, 1e6), impl="cpu")[1]
    s = expected.clamp(min=1).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(got.double(), values.double().clamp(-s, s) / s, rtol=1e-6, atol=1e-6)


def test_quantile_of_equal_values() -> None:
    x0 = torch.full((1, 1, 1, 50, 50), 2.5)
    got = ddim_step(x0, x0, 0.5, 0.7, prediction_type="sample", dynamic_threshold=(0.995, 10.0), impl="cpu")[1]
    assert torch.equal(got, torch.ones_like(got))


# ---- not-a-number, determinism, compile, opcheck --------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("limits", [{"clip_sample": 1.0}, {"dynamic_threshold": (0.9, 2.0)}], ids=["clip", "threshold"])
def test_nan_is_carried(impl: str, limits: dict[str, Any]) -> None:
    x, out = torch.randn(2, 2, 3, 4, 4), torch.randn(2, 2, 3, 4, 4)
    out[0, 1, 2, 3, 3] = math.nan
    prev, original = ddim_step(x, out, 0.5, 0.7, impl=impl, **limits)
    assert prev[0, 1, 2, 3, 3].isnan()
    assert original[0, 1, 2, 3, 3].isnan()
    assert not prev[1].isnan().any()
    assert original[0].isnan().all() == ("dynamic_threshold" in limits)  # as torch.quantile does


def test_same_input_same_output_for_any_thread_count() -> None:
    x, out, uncond = (torch.randn(2, 4, 8, 64, 64) for _ in range(3))
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            ddim_step(
                x, out, 0.5, 0.7, uncond_output=uncond, guidance_scale=4.0, guidance_rescale=0.7,
                dynamic_threshold=(0.99, 3.0), eta=1.0, noise_seed=torch.tensor([5]), impl="cpu",
            )
        )  # fmt: skip
    for prev, original in results[1:]:
        assert torch.equal(prev, results[0][0])
        assert torch.equal(original, results[0][1])


def test_no_clip_keeps_nothing_for_the_backward() -> None:
    x, out = torch.randn(1, 2, 3, 4, 4, requires_grad=True), torch.randn(1, 2, 3, 4, 4, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        ddim_step(x, out, 0.5, 0.7, impl="cpu")
    assert sum(sizes) == 0


def test_gradcheck_of_the_reference() -> None:
    x, out, uncond, z = (torch.randn(2, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(4))

    scale = torch.rand(2, 3)

    def step(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return ddim_step(
            tensors[0], tensors[1], 0.4, 0.8, uncond_output=tensors[2], guidance_scale=scale, guidance_rescale=0.5,
            noise=tensors[3], eta=0.5, dynamic_threshold=(0.8, 1.7),
        )  # fmt: skip

    assert torch.autograd.gradcheck(step, (x, out, uncond, z))


def test_second_derivative_names_the_way_out() -> None:
    x, out = torch.randn(1, 2, 3, 4, 4, requires_grad=True), torch.randn(1, 2, 3, 4, 4)
    prev, _ = ddim_step(x, out, 0.5, 0.7, clip_sample=1.0, impl="cpu")
    (grad,) = torch.autograd.grad((prev**2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='impl="reference"'):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("layout", [contiguous, channels_last, transposed], ids=lambda f: f.__name__)
def test_opcheck(clip: float | None, layout: Any, impl: str) -> None:
    x, out, uncond, z = (layout(torch.randn(2, 3, 4, 3, 5)).requires_grad_() for _ in range(4))
    arguments = (
        x, out, uncond, z, None, None, 0.5, torch.tensor([0.7, 0.8]), 1.0, torch.rand(2, 4), 1.0, 0.0, "v_prediction",
        1.0, clip, 0.0, 0.0, True, True, impl,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastvdiff.ddim_step.default, arguments)


def test_compiles_whole_for_any_timestep_and_size() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(x: torch.Tensor, out: torch.Tensor, a: float, b: float) -> torch.Tensor:
        return ddim_step(x, out, a, b, clip_sample=1.0)[0]

    x, out = torch.randn(1, 2, 3, 4, 4), torch.randn(1, 2, 3, 4, 4)
    for a in (0.1, 0.2, 0.3, 0.4, 0.5):
        torch.testing.assert_close(step(x, out, a, a + 0.3), ddim_step(x, out, a, a + 0.3, clip_sample=1.0)[0])
    for size in (5, 6, 7, 8):
        step(torch.randn(1, 2, 3, size, size), torch.randn(1, 2, 3, size, size), 0.1, 0.4)
    assert counter.frame_count <= 3  # the first, one for any float, one for any size


def test_compiled_gradients() -> None:
    torch._dynamo.reset()
    x, out = torch.randn(1, 2, 3, 4, 4, requires_grad=True), torch.randn(1, 2, 3, 4, 4, requires_grad=True)
    alphas = torch.tensor(0.4), torch.tensor(0.8)

    def loss() -> torch.Tensor:
        return ddim_step(x, out, *alphas, clip_sample=1.0)[0].square().sum()

    expected = torch.autograd.grad(loss(), (x, out))
    for got, exact in zip(torch.autograd.grad(torch.compile(loss, fullgraph=True)(), (x, out)), expected, strict=True):
        torch.testing.assert_close(got, exact)


def test_autocast_leaves_it_alone() -> None:
    x, out = torch.randn(1, 2, 3, 4, 4), torch.randn(1, 2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = ddim_step(x, out, 0.5, 0.7)[0]
    assert got.dtype == torch.float32
    assert torch.equal(got, ddim_step(x, out, 0.5, 0.7)[0])


# ---- choice of implementation ---------------------------------------------------------------------------------------


def test_narrow_model_outputs_beside_a_float32_sample_run_natively() -> None:
    x, out = torch.randn(1, 2, 3, 4, 4), torch.randn(1, 2, 3, 4, 4).bfloat16()
    got = ddim_step(x, out, 0.5, 0.7, impl="cpu")[0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, ddim_step(x, out, 0.5, 0.7, impl="reference")[0])


X = torch.zeros(2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("reason", "x", "options"),
    [
        ("float64", X.double(), {}),
        ("wider than the sample", X.bfloat16(), {}),
        ("through guidance_rescale", X.clone().requires_grad_(), {"uncond_output": X, "guidance_rescale": 0.5}),
        ("through dynamic_threshold", X.clone().requires_grad_(), {"dynamic_threshold": (0.9, 2.0)}),
        ("to alpha_t", X, {"uncond_output": X, "guidance_scale": torch.ones(2, 4, requires_grad=True)}),
    ],
    ids=["float64", "wide", "rescale", "threshold", "coefficients"],
)
def test_cpu_refuses_with_a_sentence(reason: str, x: torch.Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        ddim_step(x, X, 0.5, 0.7, impl="cpu", **options)
    ddim_step(x, X, 0.5, 0.7, **options)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "error", "changes"),
    [
        (r"sample: expected a tensor, got", TypeError, {"sample": 3}),
        (r"sample: expected dtype float32.*got torch.int64", TypeError, {"sample": X.long()}),
        (r"sample: expected two dimensions or more", ValueError, {"sample": torch.zeros(3)}),
        (r"model_output: expected a tensor, got None", TypeError, {"model_output": None}),
        (r"model_output: expected shape of sample = \(2, 3, 4, 5, 6\), got", ValueError, {"model_output": X[:1]}),
        (r"uncond_output: expected shape of sample", ValueError, {"uncond_output": X[..., :2]}),
        (r"uncond_output: expected a tensor, as there is a guidance_scale", ValueError, {"guidance_scale": 7.5}),
        (r"uncond_output: expected a tensor, as there is", ValueError, {"guidance_rescale": 0.5}),
        (
            r"guidance_scale: expected shape .*\(2, 4\), got \(4,\)",
            ValueError,
            {"uncond_output": X, "guidance_scale": torch.ones(4)},
        ),
        (r"guidance_scale: expected a float or a tensor", TypeError, {"uncond_output": X, "guidance_scale": "7"}),
        (
            r"guidance_rescale: expected a float in \[0, 1\], got 2",
            ValueError,
            {"uncond_output": X, "guidance_rescale": 2},
        ),
        (r"alpha_t: expected a float in \[0, 1\].*got 1.5", ValueError, {"alpha_t": 1.5}),
        (r"alpha_t: expected shape \(\) or \(B,\).*got \(3,\)", ValueError, {"alpha_t": torch.ones(3)}),
        (r"alpha_prev: expected dtype float32", TypeError, {"alpha_prev": torch.ones(2, dtype=torch.int64)}),
        (
            r"prediction_type: expected 'epsilon' or 'sample' or 'v_prediction', got 'eps'",
            ValueError,
            {"prediction_type": "eps"},
        ),
        (r"eta: expected a float from 0 upward, got -1", ValueError, {"eta": -1}),
        (r"noise: expected a noise tensor or a noise_seed, as eta = 0.5 > 0, got neither", ValueError, {"eta": 0.5}),
        (r"noise: expected shape of sample", ValueError, {"eta": 0.5, "noise": X[:1]}),
        (
            r"noise_seed: expected None, as there is a noise tensor",
            ValueError,
            {"eta": 0.5, "noise": X, "noise_seed": torch.tensor([1])},
        ),
        (
            r"noise_seed: expected an int64 tensor of shape \(1,\)",
            ValueError,
            {"eta": 0.5, "noise_seed": torch.tensor(1)},
        ),
        (r"noise_seed: expected a tensor, got 5", TypeError, {"eta": 0.5, "noise_seed": 5}),
        (r"clip_sample: expected a float above 0, or None, got 0", ValueError, {"clip_sample": 0}),
        (
            r"dynamic_threshold: expected \(ratio in \[0, 1\], maximum above 0\)",
            ValueError,
            {"dynamic_threshold": (99.5, 1.0)},
        ),
        (r"dynamic_threshold: expected \(ratio", ValueError, {"dynamic_threshold": 0.9}),
        (r"impl: expected one of 'cpu', 'triton', 'reference', got 'tpu'", ValueError, {"impl": "tpu"}),
    ],
)
def test_bad_input(message: str, error: type[Exception], changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"sample": X, "model_output": X, "alpha_t": 0.5, "alpha_prev": 0.7, **changes}
    with pytest.raises(error, match=f"^ddim_step: {message}"):
        ddim_step(**arguments)
