"""ddim_step's Triton kernels, under the interpreter where there is no GPU."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvdiff.kernels import ddim_step_statistics, dense_layout, launch, philox
from fastvdiff.ops import ddim_step
from fastvdiff.reference.philox import philox_4x32, philox_normal
from tests.closeness import hold
from tests.kernels.whole_ddim_step import everything
from tests.ops.drawn_ddim_step import LAYOUTS, NARROW, PREDICTIONS, calls

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=240)
@given(calls(DEVICE))
def test_holds_to_float64(call: tuple[tuple[Any, ...], dict[str, Any], torch.dtype]) -> None:
    args, options, dtype = call
    outputs = hold(ddim_step, *args, impl="triton", dtype=dtype, **options)
    for output in outputs:
        if output is not None:
            assert output.dtype == dtype
            assert output.stride() == torch.empty_like(args[0]).stride()


def tried(used: launch.Launch, device: str) -> list[launch.Configuration]:
    """The configurations to try; under the interpreter, where warps do not exist, one of each size that matters."""
    assert used.used in used.candidates
    smallest = {"BLOCK": 64, "num_warps": 1, "num_stages": 1}
    return [*used.candidates, smallest] if device == "cuda" else [used.candidates[-1], smallest]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_candidate_configuration(device: str, dtype: torch.dtype) -> None:
    """In small tiles too, where a frame, a sample and a histogram take several."""
    arguments = everything(device, dtype)
    with launch.recorded() as launches:
        ddim_step(**arguments, impl="triton")
    assert {x.kernel for x in launches} == {"ddim_step_fwd", "ddim_step_moments", "ddim_step_histogram"}
    for used in launches:
        for candidate in tried(used, device):
            with launch.trying(used.kernel, used.shape_class, candidate):
                hold(ddim_step, impl="triton", dtype=dtype, **arguments)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_every_backward_configuration(device: str, clip: float | None) -> None:
    x, out, uncond = (torch.randn(2, 3, 4, 5, 7, device=device, requires_grad=True) for _ in range(3))
    options = {
        "uncond_output": uncond, "guidance_scale": torch.rand(2, 4, device=device), "clip_sample": clip,
        "use_clipped_model_output": True,
    }  # fmt: skip
    with launch.recorded() as launches:
        ddim_step(x, out, 0.4, 0.7, impl="triton", **options)[0].sum().backward()
    (used,) = (x for x in launches if x.kernel == "ddim_step_bwd")
    for candidate in tried(used, device):
        with launch.trying(used.kernel, used.shape_class, candidate):
            hold(ddim_step, x, out, 0.4, 0.7, impl="triton", dtype=torch.float32, **options)


@pytest.mark.parametrize("shape", [(0, 4, 3, 5, 7), (2, 4, 0, 5, 7), (0, 3, 8, 8)], ids=str)
def test_empty(device: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    seed = torch.tensor([1], device=device)
    prev, original = ddim_step(
        x, x.detach(), 0.5, 0.7, eta=1.0, noise_seed=seed, dynamic_threshold=None, clip_sample=1.0, impl="triton"
    )
    assert prev.shape == original.shape == shape
    assert torch.autograd.grad(prev.sum() + original.sum(), x)[0].shape == shape
    options = {"dynamic_threshold": (0.9, 2.0), "uncond_output": x.detach(), "guidance_rescale": 0.5}
    assert ddim_step(x.detach(), x.detach(), 0.5, 0.7, impl="triton", **options)[0].shape == shape


# ---- coefficients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.5])
def test_any_two_cumulative_products(device: str, prediction: str, eta: float) -> None:
    """The ends of the schedule, equal neighbours, steps backward and radicands below 0, NaN and infinity included."""
    values = (0.0, 1e-9, 0.3, 0.7, 0.99999, 1 - 1e-9, 1.0)
    x, out, z = (torch.randn(1, 1, 1, 2, 3, device=device) for _ in range(3))
    pairs = torch.tensor(list(itertools.product(values, values)), dtype=torch.float64, device=device)
    many = [t.expand(len(pairs), 1, 1, 2, 3).contiguous() for t in (x, out, z)]
    options: dict[str, Any] = {"prediction_type": prediction, "eta": eta}
    got = ddim_step(*many[:2], pairs[:, 0], pairs[:, 1], noise=many[2] if eta else None, impl="triton", **options)
    for i, (a, following) in enumerate(pairs.tolist()):
        exact = ddim_step(x, out, a, following, noise=z if eta else None, impl="reference", **options)
        for y, expected in zip(got, exact, strict=True):
            torch.testing.assert_close(
                y[i : i + 1], expected, rtol=2e-5, atol=1e-6, equal_nan=True, msg=f"{a} {following}"
            )
    for a, following in ((0.3, 0.99999), (1 - 1e-9, 1.0)):
        numbers = ddim_step(x, out, a, following, noise=z if eta else None, impl="triton", **options)
        i = pairs.tolist().index([a, following])
        assert torch.equal(numbers[0], got[0][i : i + 1])  # a float and a float64 tensor are the same number


def test_narrow_coefficients_and_wide_guidance(device: str) -> None:
    x, out, uncond = (torch.randn(2, 3, 4, 5, 6, device=device) for _ in range(3))
    alphas = torch.tensor([[0.25, 0.5], [0.75, 0.875]], device=device).to(torch.bfloat16)
    hold(
        ddim_step, x, out, alphas[0], alphas[1], uncond_output=uncond, impl="triton", dtype=torch.float32,
        guidance_scale=torch.rand(4, 2, device=device, dtype=torch.float64).mT,
    )  # fmt: skip


# ---- noise from a seed ----------------------------------------------------------------------------------------------


# Of the dimensions in memory: contiguous, channels_last_3d, frames before channels, three and four runs, batch inside.
ORDERS = (
    (0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (0, 2, 1, 3, 4), (0, 4, 2, 3, 1), (0, 4, 3, 2, 1), (1, 0, 2, 3, 4),
    (2, 3, 4, 1, 0),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 3, 4, 8), (2, 3, 5, 3, 7), (1, 4, 2, 2, 6)], ids=str)
def test_noise_from_a_seed_does_not_depend_on_the_layout(
    device: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """For layouts walked in memory order as well as for those that are copied."""
    x, out = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(dtype)
    seed = torch.tensor([77], device=device)
    for alpha_prev in (0.7, torch.full((shape[0],), 0.7, device=device)):
        exact = ddim_step(x, out, 0.5, alpha_prev, eta=1.0, noise_seed=seed, impl="reference")[0]
        for order in ORDERS:
            laid = [t.permute(order).contiguous().permute([order.index(d) for d in range(5)]) for t in (x, out)]
            got = ddim_step(*laid, 0.5, alpha_prev, eta=1.0, noise_seed=seed, impl="triton")[0]
            assert got.stride() == laid[0].stride()
            torch.testing.assert_close(got, exact, rtol=2 * torch.finfo(dtype).eps, atol=3e-6)


@triton.jit
def normals_kernel(runs_ptr, elements_ptr, words_ptr, seed_ptr, first, run: tl.constexpr, n: tl.constexpr):
    """The same normals in runs and one by one, and the words of the blocks."""
    seed = tl.load(seed_ptr)
    index = tl.arange(0, n)
    base = tl.cast(first, tl.int64)
    tl.store(runs_ptr + index, philox.normals_of_runs((base + tl.arange(0, n // run) * run) >> 2, seed, run))
    tl.store(elements_ptr + index, philox.normals_of_elements(base + index, seed))
    block = tl.arange(0, n // 4)
    w0, w1, w2, w3 = tl.randint4x(seed, (base >> 2) + block)
    tl.store(words_ptr + 4 * block, w0.to(tl.int64))
    tl.store(words_ptr + 4 * block + 1, w1.to(tl.int64))
    tl.store(words_ptr + 4 * block + 2, w2.to(tl.int64))
    tl.store(words_ptr + 4 * block + 3, w3.to(tl.int64))


@pytest.mark.parametrize("run", [4, 8])
@pytest.mark.parametrize("seed", [0, 1, -1, 0x123456789ABCDEF0, -(2**63)])
@pytest.mark.parametrize("first", [0, 2**31 - 16, 2**36 + 8])
def test_normals(device: str, run: int, seed: int, first: int) -> None:
    """Words bit by bit and normals to 1e-6, beyond 2^31 elements and 2^32 blocks too."""
    n = 4096
    runs, elements = torch.empty(n, device=device), torch.empty(n, device=device)
    words, seeds = torch.empty(n, dtype=torch.int64, device=device), torch.tensor([seed], device=device)
    normals_kernel[(1,)](runs, elements, words, seeds, first, run=run, n=n)
    assert (runs - elements).abs().max() < 1e-6
    exact = philox_4x32(torch.arange(first // 4, (first + n) // 4, device=device), seeds)
    assert torch.equal(words.view(-1, 4), exact)
    uniform = exact.to(torch.float32)[:, 0::2] * 2.0**-32 + 2.0**-33
    magnitude = (-2 * uniform.double().log()).sqrt()
    angle = (exact[:, 1::2] >> 8).double() * (2 * math.pi * 2.0**-24)
    normals = torch.stack((magnitude * angle.cos(), magnitude * angle.sin()), -1).flatten()
    assert (runs - normals).abs().max() < 1e-6
    if first == 0:
        assert torch.equal(normals, philox_normal((n,), seeds, torch.float64))


def test_seed_is_read_when_the_step_runs(device: str) -> None:
    x, seed = torch.zeros(1, 1, 2, 4, 4, device=device), torch.tensor([1], device=device)
    first = ddim_step(x, x, 0.5, 0.7, eta=1.0, noise_seed=seed, impl="triton")[0]
    seed.fill_(2)
    assert not torch.equal(first, ddim_step(x, x, 0.5, 0.7, eta=1.0, noise_seed=seed, impl="triton")[0])


# ---- layouts --------------------------------------------------------------------------------------------------------


@triton.jit
def logical_kernel(out_ptr, sizes, strides, rank: tl.constexpr, n: tl.constexpr, block: tl.constexpr):
    index = tl.arange(0, block)
    tl.store(out_ptr + index, dense_layout.logical_index(index, sizes, strides, rank), mask=index < n)


@settings(max_examples=60)
@given(st.permutations(range(4)), st.tuples(*[st.integers(1, 4)] * 4))
def test_logical_index(order: list[int], shape: tuple[int, ...]) -> None:
    """Of every position in memory, for any order of the dimensions that merges into three runs or fewer."""
    inverse = [order.index(d) for d in range(4)]
    logical = torch.arange(math.prod(shape), device=DEVICE).view(shape).permute(order).contiguous()
    like = logical.permute(inverse)
    runs = dense_layout.logical_runs(shape, dense_layout.memory_order(like))
    expected = logical.flatten()
    if len(runs) <= 3:
        sizes, strides = zip(*runs, strict=True)
        got = torch.empty_like(expected)
        logical_kernel[(1,)](got, sizes[1:] or None, strides, rank=len(runs), n=got.numel(), block=256)
        assert torch.equal(got, expected)
    by_hand = torch.zeros(1, dtype=torch.int64)
    for size, stride in runs:
        by_hand = (by_hand[:, None] + torch.arange(size) * stride).flatten()
    assert torch.equal(by_hand, expected.cpu())


def test_inputs_of_other_layouts_than_the_sample(device: str) -> None:
    x, out, uncond, z = (torch.randn(2, 3, 4, 5, 6, device=device, requires_grad=True) for _ in range(4))
    for layouts in itertools.permutations(LAYOUTS):
        a, b, c, d = (f(t.detach()).requires_grad_() for f, t in zip(layouts, (x, out, uncond, z), strict=True))
        hold(
            ddim_step, a, b, 0.4, torch.tensor([0.6, 0.7], device=device), uncond_output=c, noise=d, eta=0.5,
            guidance_scale=torch.rand(1, 4, device=device), clip_sample=1.0, impl="triton", dtype=torch.float32,
        )  # fmt: skip


# ---- statistics -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["in two passes", "with a look before"])
def looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Small samples read as small ones are, and as large ones."""
    if request.param:
        monkeypatch.setattr(ddim_step_statistics, "_LARGE", 1)
        monkeypatch.setattr(ddim_step_statistics, "_EVERY", 3)
    return request.param


@pytest.mark.usefixtures("looked_at")
@pytest.mark.parametrize("most", [0.5, 1.0, 1.0001, 3.0, 100.0])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.995, 1.0])
@pytest.mark.parametrize(("count", "scale"), [(1, 4.0), (2, 4.0), (3001, 4.0), (3001, 0.2)])
def test_quantile_is_torch_quantile(device: str, ratio: float, count: int, scale: float, most: float) -> None:
    values = torch.randn(3, 1, count, 1, 1, device=device) * scale
    s = values.double().abs().flatten(1).quantile(ratio, dim=1).clamp(1, most).clamp(max=most).view(-1, 1, 1, 1, 1)
    got = ddim_step(values, values, 0.5, 0.7, prediction_type="sample", dynamic_threshold=(ratio, most), impl="triton")
    torch.testing.assert_close(got[1].double(), values.double().clamp(-s, s) / s, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.4, 0.5, 0.6, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("spread", [0.5, 2.0, 30.0])
def test_tiles_unlike_those_that_were_looked_at(
    device: str, ratio: float, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their one value is all of the bracket, and the quantile lies before or after it: the lumps are taken apart."""
    monkeypatch.setattr(ddim_step_statistics, "_LARGE", 1)
    monkeypatch.setattr(ddim_step_statistics, "_EVERY", 3)
    tile, brackets = 512, []
    plain = ddim_step_statistics.ddim_step_lumps_kernel

    class Noted:
        def __getitem__(self, grid: Any) -> Any:
            def run(counts: torch.Tensor, bracket: torch.Tensor, *args: Any, **named: Any) -> None:
                plain[grid](counts, bracket, *args, **named)
                brackets.append(bracket.clone())

            return run

    monkeypatch.setattr(ddim_step_statistics, "ddim_step_lumps_kernel", Noted())
    values = torch.randn(2, 1, 7 * tile, 1, 1, device=device) * spread
    values.view(2, 7, tile)[:, ::3] = 1.5
    s = values.double().abs().flatten(1).quantile(ratio, dim=1).clamp(1, 100).view(-1, 1, 1, 1, 1)
    got = ddim_step(values, values, 0.5, 0.7, prediction_type="sample", dynamic_threshold=(ratio, 100.0), impl="triton")
    torch.testing.assert_close(got[1].double(), values.double().clamp(-s, s) / s, rtol=1e-6, atol=1e-6)
    (bracket,) = brackets
    if 0.4 <= ratio <= 0.6:  # nearer to the ends a bracket is open
        outside = (s.flatten() > 1.0) & ((s.flatten() - 1.5).abs() > 0.01)
        assert bracket.view(2, -1)[:, 2].bool().tolist() == outside.tolist()


@pytest.mark.usefixtures("looked_at")
@pytest.mark.parametrize(
    "values",
    [
        [2.5] * 50,
        [1.0] * 50,
        [0.9] * 25 + [1.5] * 25,
        [0.1, 0.9, 3.0, 900.0],
        [2.0] * 45 + [math.inf] * 5,
        [0.5] * 45 + [math.inf] * 5,
        [1e-40] * 50,
        [1.0 + 2**-23] * 3 + [1.0] * 3,
    ],
    ids=str,
)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.49, 0.5, 0.6, 0.9, 1.0])
def test_quantile_between_far_neighbours(device: str, values: list[float], ratio: float) -> None:
    """Neighbours on both sides of 1, of the maximum and of a bin's border; equal values; infinity."""
    x0 = torch.tensor(values, device=device).view(1, 1, 1, 1, -1)
    for most in (1.0, 2.0, math.inf):
        got, exact = (
            ddim_step(x0, x0, 0.5, 0.7, prediction_type="sample", dynamic_threshold=(ratio, most), impl=impl)[1]
            for impl in ("triton", "reference")
        )
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_rescale_far_from_zero(device: str) -> None:
    """Means of 10^4 beside deviations of 1."""
    out, uncond = (torch.randn(2, 3, 4, 16, 24, device=device) + 1e4 for _ in range(2))
    got = ddim_step(
        torch.zeros_like(out), out, 0.0, 1.0, uncond_output=uncond, guidance_scale=3.0, guidance_rescale=1.0,
        prediction_type="sample", impl="triton",
    )[1]  # fmt: skip
    guided = uncond + 3 * (out - uncond)
    rest = (1, 2, 3, 4)
    exact = guided.double() * out.double().std(rest, keepdim=True) / guided.double().std(rest, keepdim=True)
    torch.testing.assert_close(got.double(), exact, rtol=3e-6, atol=0)


# ---- not-a-number, determinism, refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [
        {"clip_sample": 1.0},
        {"dynamic_threshold": (0.9, 1.0)},
        {"dynamic_threshold": (0.9, 2.0)},
        {"guidance_rescale": 1},
    ],
    ids=str,
)
def test_nan_is_carried(device: str, limits: dict[str, Any]) -> None:
    x, out, uncond = (torch.randn(2, 2, 3, 4, 4, device=device) for _ in range(3))
    out[0, 1, 2, 3, 3] = math.nan
    prev, original = ddim_step(x, out, 0.5, 0.7, uncond_output=uncond, guidance_scale=3.0, impl="triton", **limits)
    assert prev[0, 1, 2, 3, 3].isnan()
    assert original[0, 1, 2, 3, 3].isnan()
    assert not prev[1].isnan().any()
    assert original[0].isnan().all() == ("clip_sample" not in limits)


def test_a_clipped_gradient_of_nan_is_zero_as_the_reference_has_it(device: str) -> None:
    x, out = torch.randn(1, 2, 3, 4, 4, device=device), torch.randn(1, 2, 3, 4, 4, device=device)
    x[0, 0, 0, 0, 0] = math.nan
    x.requires_grad_()
    got, exact = (
        torch.autograd.grad(ddim_step(x, out, 0.5, 0.7, clip_sample=1.0, impl=impl)[0].sum(), x)[0]
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(got, exact, equal_nan=True)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_same_input_same_output(device: str, dtype: torch.dtype) -> None:
    arguments = everything(device, dtype)
    first = ddim_step(**arguments, impl="triton")
    for _ in range(250 if device == "cuda" else 2):
        assert all(map(torch.equal, first, ddim_step(**arguments, impl="triton")))


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
def test_refuses_with_a_sentence(device: str, reason: str, x: torch.Tensor, options: dict[str, Any]) -> None:
    on = {
        k: v.detach().to(device).requires_grad_(v.requires_grad) if torch.is_tensor(v) else v
        for k, v in options.items()
    }
    sample = x.detach().to(device).requires_grad_(x.requires_grad)
    with pytest.raises(NotImplementedError, match=reason):
        ddim_step(sample, X.to(device), 0.5, 0.7, impl="triton", **on)
