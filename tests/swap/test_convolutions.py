"""torch's Conv3d in anybody's module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastvdiff
from fastvdiff import ops
from tests.swap import contract


def network(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"inner": nn.Conv3d(6, 9, (3, 2, 3), **options)})["inner"]


OPTIONS = [
    {}, {"padding": "same"}, {"padding": (2, 0, 1), "stride": (1, 2, 2)}, {"groups": 3, "padding": 1},
    {"padding": 1, "padding_mode": "replicate"}, {"bias": False, "dilation": (1, 2, 1), "padding": 2},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_output_every_gradient_keys_and_undo(options: dict[str, object], batch: int) -> None:
    report = contract.hold(network(**options), {"input": torch.randn(batch, 6, 5, 8, 7)})
    assert contract.counts(report) == {"Conv3d": 1}


@contract.narrow
def test_16_bit_weights(dtype: torch.dtype) -> None:
    contract.hold(network(padding=1), {"input": torch.randn(2, 6, 5, 8, 7)}, dtype)


def test_training_follows_eager() -> None:
    x = torch.randn(1, 6, 5, 8, 7)
    contract.hold_training(lambda: network(padding=1), {"input": x}, torch.randn(1, 9, 5, 9, 7), lr=1e-2)


def test_save_load_and_autocast() -> None:
    contract.hold_round_trip(network(padding=1), network(padding=1), {"input": torch.randn(1, 6, 5, 8, 7)})


def test_no_graph_break_is_added() -> None:
    conv = network(padding=1)
    fastvdiff.swap_kernels(conv)
    assert contract.graphs_and_breaks(conv, {"input": torch.randn(1, 6, 5, 8, 7)}) == (1, 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of the clips that reach the op."""
    seen: list[torch.dtype] = []
    run = ops.conv3d
    monkeypatch.setattr(ops, "conv3d", lambda x, *a, **k: (seen.append(x.dtype), run(x, *a, **k))[1])
    return seen


def test_only_where_torch_is_slow(calls: list[torch.dtype]) -> None:
    """A batch of one with few rows is im2col; two clips are oneDNN's, and torch's own."""
    conv = network(padding=1)
    eager = copy.deepcopy(conv)
    fastvdiff.swap_kernels(conv)
    for batch, taken in ((1, 1), (2, 0)):
        x = torch.randn(batch, 6, 5, 8, 7)
        torch.testing.assert_close(conv(x), eager(x), rtol=1e-4, atol=1e-5)
        assert len(calls) == taken
        calls.clear()
    assert conv(torch.randn(6, 5, 8, 7)).dim() == 4
    assert not calls


def test_autocast_and_16_bit_weights(calls: list[torch.dtype]) -> None:
    conv = network(padding=1)
    eager = copy.deepcopy(conv)
    fastvdiff.swap_kernels(conv)
    x = torch.randn(2, 6, 5, 8, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = conv(x), eager(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(conv.bfloat16()(x.bfloat16()), eager.bfloat16()(x.bfloat16()), rtol=2e-2, atol=2e-2)


def test_what_is_refused_and_what_has_a_forward_of_its_own() -> None:
    class Other(nn.Conv3d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return -super().forward(input)

    class Inner(nn.Conv3d):
        def _conv_forward(self, *arguments: torch.Tensor) -> torch.Tensor:
            return -super()._conv_forward(*arguments)

    circular = nn.Conv3d(2, 2, 3, padding=1, padding_mode="circular")
    model = nn.ModuleList([nn.Conv3d(2, 2, 1), circular, Inner(2, 2, 3), Other(2, 2, 3)])
    report = fastvdiff.swap_kernels(model)
    assert not report.replaced
    assert [e.path for e in report.refused] == ["0", "1", "2"]
    assert "a way of its own" in report.refused[2].why
    assert "matrix product" in report.refused[0].why
    assert "padding_mode 'circular'" in report.refused[1].why


def test_a_block_that_reads_a_swapped_convolution_still_fuses() -> None:
    """Whatever was swapped first: a convolution inside a block that is known keeps being read by it."""
    from fastvdiff.swap.target import plain

    conv = nn.Conv3d(2, 2, 3)
    fastvdiff.swap_kernels(conv)
    assert type(conv) is not nn.Conv3d
    assert plain(conv, nn.Conv3d)
