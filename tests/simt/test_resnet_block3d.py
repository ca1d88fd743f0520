"""The residual block where conv3d's CUDA kernels run: the second norm is taken along by the two convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fastvdiff import dispatch
from fastvdiff.nn import ResnetBlock3d
from tests.closeness import GRADIENT_RATIO, GRADIENT_SCALE, assert_close

from .conv3d_library import shim

KERNELS = dict.fromkeys(("conv3d", "group_norm_silu", "norm_silu_conv3d"), "cuda")


@pytest.fixture(autouse=True)
def _on_shim(on_shim: object) -> Iterator[None]:
    with shim():
        yield


def block(**options: Any) -> ResnetBlock3d:
    torch.manual_seed(0)
    module = ResnetBlock3d(8, 16, temb_channels=12, groups=4, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.bfloat16()


def inputs(dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 8, 3, 5, 4).bfloat16().to(device, dtype).contiguous(memory_format=torch.channels_last_3d)
    return x.requires_grad_(), torch.randn(2, 12).bfloat16().to(device, dtype)


def ran(module: nn.Module, *args: torch.Tensor) -> list[str]:
    with dispatch.use_impl(**KERNELS):
        return [walk.op for walk in dispatch.trace(module, *args)]


def values(module: nn.Module, x: torch.Tensor, temb: torch.Tensor) -> list[torch.Tensor]:
    y = module(x, temb)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(y)
    return [y, *torch.autograd.grad(y, (x, *module.parameters()), cotangent)]


def hold_block(conv: str, norm: str, device: str = "cpu") -> None:
    """A block on the kernels, output and every gradient, to float64 beside eager."""
    module = block(conv=conv, time_embedding_norm=norm).to(device)
    with dispatch.use_impl(**KERNELS):
        found = values(module, *inputs(device=device))
    with dispatch.use_impl("reference"):
        eager = values(module, *inputs(device=device))
        exact = values(block(conv=conv, time_embedding_norm=norm).double(), *inputs(torch.float64))
    found, eager = ([t.cpu() for t in of_way] for of_way in (found, eager))
    assert_close(found[0], exact[0], eager[0])
    largest = max(float(g.norm()) for g in exact[1:])
    for grad, baseline, oracle in zip(found[1:], eager[1:], exact[1:], strict=True):
        assert_close(grad, oracle, baseline, ratio=GRADIENT_RATIO, least_scale=GRADIENT_SCALE * largest)


@pytest.mark.parametrize("conv", ["spatial", "factorized", "full"])
@pytest.mark.parametrize("norm", ["default", "scale_shift"])
def test_the_norm_between_is_no_pass_of_its_own(conv: str, norm: str) -> None:
    ops = ran(block(conv=conv, time_embedding_norm=norm), *inputs())
    assert ops.count("group_norm_silu") == 1
    assert "norm_silu_conv3d" in ops
    hold_block(conv, norm)


def test_who_watches_sees_the_modules_called() -> None:
    module, seen = block(), []
    module.norm2.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    assert ran(module, *inputs()).count("group_norm_silu") == 2
    assert seen == [(2, 16, 3, 5, 4)]


def test_dropout_stands_between() -> None:
    module = block(dropout=0.5)
    assert ran(module, *inputs()).count("group_norm_silu") == 2
    assert ran(module.eval(), *inputs()).count("group_norm_silu") == 1


def test_a_convolution_in_another_s_place_is_called() -> None:
    module = block()
    module.conv2 = nn.Conv3d(16, 16, 1).bfloat16()
    module.conv2.forward = lambda x, residual: nn.Conv3d.forward(module.conv2, x) + residual
    assert ran(module, *inputs()).count("group_norm_silu") == 2


def test_a_hook_on_the_first_convolution_sees_a_tensor() -> None:
    for conv in ("spatial", "factorized"):
        module, seen = block(conv=conv), []
        watched = module.conv1 if conv == "spatial" else module.conv1.temporal
        watched.register_forward_hook(lambda m, args, y, seen=seen: seen.append(type(y)))
        ran(module, *inputs())
        assert seen == [torch.Tensor]


@pytest.mark.parametrize("change", ["padding", "part", "norm"])
def test_what_is_not_as_it_was_built_is_called(change: str) -> None:
    module = block(conv="factorized" if change == "part" else "spatial")
    if change == "padding":
        module.conv2.padding_mode = "replicate"
    elif change == "part":
        spatial = module.conv2.spatial
        spatial.__class__ = type("Adapted", (type(spatial),), {})
    else:
        module.norm2.__class__ = type("Other", (type(module.norm2),), {})
    assert "norm_silu_conv3d" not in ran(module, *inputs())


def test_another_module_as_dropout() -> None:
    module = block()
    module.dropout = nn.Identity()
    x, temb = inputs(torch.float32)
    with dispatch.use_impl("reference"):
        assert module.float().train()(x, temb).shape == (2, 16, 3, 5, 4)
    assert "norm_silu_conv3d" not in ran(module.bfloat16(), *inputs())
