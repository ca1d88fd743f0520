"""MONAI's ResNet blocks: doubles, and the library itself where it is installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastvdiff
from tests.swap import contract, doubles_monai

SIZES = {2: (8, 6), 3: (4, 8, 6)}


def network(spatial_dims: int) -> tuple[nn.Module, contract.Inputs]:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 3, *SIZES[spatial_dims]), "timesteps": torch.tensor([7, 500])}
    return doubles_monai.Network(spatial_dims), inputs


@pytest.mark.parametrize("spatial_dims", SIZES)
def test_output_every_gradient_keys_and_undo(spatial_dims: int) -> None:
    model, inputs = network(spatial_dims)
    report = contract.hold(model.eval(), inputs)
    first_and_last = {"Conv3d": 2} if spatial_dims == 3 else {}
    assert contract.counts(report) == {"DiffusionUNetResnetBlock": 3, "AEKLResBlock": 2, **first_and_last}
    assert "GroupNorm" not in contract.refusals(report.refused)


@contract.narrow
def test_16_bit_weights(dtype: torch.dtype) -> None:
    """In two dimensions: torch has no 16-bit average over three on a CPU."""
    model, inputs = network(2)
    contract.hold(model.eval(), inputs, dtype)


@pytest.mark.parametrize("spatial_dims", SIZES)
def test_training_follows_eager(spatial_dims: int) -> None:
    model, inputs = network(spatial_dims)
    contract.hold_training(lambda: network(spatial_dims)[0], inputs, torch.randn(model(**inputs).shape))


@pytest.mark.parametrize("spatial_dims", SIZES)
def test_no_graph_break_is_added(spatial_dims: int) -> None:
    model, inputs = network(spatial_dims)
    fastvdiff.swap_kernels(model.eval())
    with torch.no_grad():
        assert contract.graphs_and_breaks(model, inputs) == (1, 0)


@pytest.mark.parametrize("spatial_dims", SIZES)
def test_save_load_and_autocast(spatial_dims: int) -> None:
    contract.hold_round_trip(network(spatial_dims)[0], *network(spatial_dims))


def test_hooks_on_a_convolution_are_called() -> None:
    model, inputs = network(3)
    seen: list[str] = []
    model.blocks[0].conv1.register_forward_hook(lambda *a: seen.append("outer"))
    model.blocks[0].conv2.conv.register_forward_hook(lambda *a: seen.append("inner"))
    with torch.no_grad():
        before = model.eval()(**inputs)
        fastvdiff.swap_kernels(model)
        torch.testing.assert_close(model(**inputs), before, rtol=1e-4, atol=1e-5)
    assert seen == ["outer", "inner"] * 2


def test_the_library_itself() -> None:
    nets = pytest.importorskip("monai.networks.nets")

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nets.DiffusionModelUNet(
            spatial_dims=3, in_channels=3, out_channels=3, channels=(8, 16), attention_levels=(False, False),
            num_res_blocks=1, norm_num_groups=4, resblock_updown=True,
        )  # fmt: skip

    inputs = {"x": torch.randn(2, 3, 8, 8, 8), "timesteps": torch.tensor([7, 500])}
    assert contract.counts(contract.hold(make().eval(), inputs))["DiffusionUNetResnetBlock"] >= 6
    contract.hold_training(make, inputs, torch.randn(2, 3, 8, 8, 8))
    contract.hold_round_trip(make(), make(), inputs)


@pytest.mark.parametrize("spatial_dims", SIZES)
def test_one_time_step_for_a_batch(spatial_dims: int) -> None:
    contract.hold_one_time_step(*network(spatial_dims), "timesteps")


@pytest.mark.parametrize("spatial_dims", SIZES)
def test_autocast_leaves_the_sum_in_float32(spatial_dims: int) -> None:
    x = torch.randn(2, 16, *SIZES[spatial_dims])
    contract.hold_autocast_dtypes(
        network(spatial_dims)[0], {"blocks.1": (x, torch.randn(2, 32)), "decoder.1": (x[:, :8],)}
    )
