"""geglu: values and gradients against float64, every layout and instruction set, what is not finite, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fastvdiff import dispatch, native
from fastvdiff.nn import GEGLU
from fastvdiff.ops import geglu
from tests.closeness import hold

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def eager(x: torch.Tensor) -> torch.Tensor:
    """diffusers' own expression."""
    h, gate = x.chunk(2, dim=-1)
    return h * F.gelu(gate)


@st.composite
def tensors(draw: st.DrawFn, device: str = "cpu") -> torch.Tensor:
    """A leaf of one to four dimensions: whole, cut out of wider rows, or with its last dimension not innermost."""
    shape = [*draw(st.lists(st.integers(0, 5), max_size=3)), 2 * draw(st.integers(0, 70))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 3)))
    x = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 1.0, 4.0]))
    x = x.to(device, draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["whole", "cut", "turned"]))
    if layout == "cut":
        x = F.pad(x, (3, 5), value=float("nan"))[..., 3:-5]
    elif layout == "turned" and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.requires_grad_()


@settings(max_examples=200)
@given(tensors())
def test_holds_to_float64(x: torch.Tensor) -> None:
    y = hold(geglu, x, impl="cpu", dtype=x.dtype, baseline=lambda x: eager(x))
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], x.shape[-1] // 2)
    assert y.is_contiguous()


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 67, 2 * 83) * 2).to(dtype).requires_grad_()
    with native.use_isa(isa):
        hold(geglu, x, impl="cpu", dtype=dtype, baseline=lambda x: eager(x))


@pytest.mark.parametrize("isa", native.available_isas())
def test_every_gate(isa: str) -> None:
    """Each value by itself: in the tail too, where 1 + erf is nearly 0, to what gate^2 in float32 allows."""
    gate = torch.cat([torch.linspace(-14, 14, 200_001), torch.tensor([-1e30, -40.0, -0.0, 0.0, 1e-30, 40.0, 1e30])])
    x = torch.stack((torch.ones_like(gate), gate), -1).requires_grad_()
    with native.use_isa(isa):
        y = geglu(x, impl="cpu")
        (dx,) = torch.autograd.grad(y.sum(), x)
    wide = gate.double()
    below = torch.special.erfc(-wide / 2**0.5) / 2
    exact = wide * below
    assert ((y[:, 0].detach() - exact).abs() <= (1e-6 + 1e-7 * wide.square()) * exact.abs() + 1e-37).all()
    slope = below + wide * torch.exp(-wide.square() / 2) / (2 * torch.pi) ** 0.5
    assert (dx[:, 1] - slope.where(wide.abs() < 1e3, (wide > 0).double())).abs().max() <= 4e-7


def test_what_is_not_finite_is_what_torch_has() -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    x = torch.cartesian_prod(values, values)
    torch.testing.assert_close(geglu(x, impl="cpu"), eager(x), equal_nan=True)


def test_same_bits_for_any_thread_count() -> None:
    x, before, runs = torch.randn(33, 70), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            runs.append(geglu(x, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_opcheck() -> None:
    op = torch.ops.fastvdiff.geglu.default
    opcheck(op, (torch.randn(3, 4, 10, requires_grad=True), "cpu"))
    opcheck(op, (torch.randn(3, 40)[:, 1:31].requires_grad_(), "cpu"))


def test_left_to_the_compiler_unless_asked_for() -> None:
    """torch.compile writes the pass itself; named, the kernel is one node of one graph."""
    x = torch.randn(5, 12)
    walk = dispatch.trace(geglu, x)[0]
    assert walk.chosen == "cpu"
    for impl in (None, "cpu"):
        compiled = torch.compile(lambda x, impl=impl: geglu(x, impl=impl), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), eager(x))


def test_autocast() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = geglu(x)
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.float().sum(), x)[0].dtype == torch.float32


def test_float64_is_the_reference_s() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert dispatch.trace(geglu, x)[0].chosen == "reference"
    torch.autograd.gradcheck(geglu, x)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 7), ValueError, r"geglu: x: expected \(\.\.\., 2 D\): an even number .* got shape \(3, 7\)"),
        (torch.zeros(()), ValueError, "an even number of elements"),
        (torch.zeros(3, 8, dtype=torch.int64), TypeError, "geglu: x: expected dtype float32"),
        ([1.0, 2.0], TypeError, "geglu: x: expected a tensor"),
    ],
    ids=["odd", "scalar", "integers", "list"],
)
def test_wrong_arguments(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        geglu(x)


def test_the_module_is_diffusers_own() -> None:
    activations = pytest.importorskip("diffusers.models.activations")
    theirs, ours = activations.GEGLU(6, 10), GEGLU(6, 10)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x))
