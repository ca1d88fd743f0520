"""lucidrains' video U-Nets: doubles of both versions, and the libraries themselves where they are installed."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

import fastvdiff
from tests.swap import contract, doubles_imagen, doubles_vdm

FRAMES = 5


def _inputs(**more: Any) -> contract.Inputs:
    return {"x": torch.randn(2, 3, FRAMES, 8, 8), "time": torch.tensor([7, 500]), **more}


def groups() -> tuple[nn.Module, contract.Inputs]:
    torch.manual_seed(0)
    return doubles_vdm.Unet3D(), _inputs()


def rms() -> tuple[nn.Module, contract.Inputs]:
    torch.manual_seed(0)
    return doubles_vdm.Unet3D(groups=None), _inputs()


def focused() -> tuple[nn.Module, contract.Inputs]:
    return groups()[0], _inputs(focus_present_mask=torch.tensor([False, True]))


def all_focused() -> tuple[nn.Module, contract.Inputs]:
    return groups()[0], _inputs(focus_present_mask=torch.tensor([True, True]))


def causal() -> tuple[nn.Module, contract.Inputs]:
    torch.manual_seed(0)
    return doubles_imagen.Unet3D(), _inputs()


def both_ways() -> tuple[nn.Module, contract.Inputs]:
    torch.manual_seed(0)
    return doubles_imagen.Unet3D(causal=False), _inputs()


def frames_apart() -> tuple[nn.Module, contract.Inputs]:
    return causal()[0], _inputs(ignore_time=True)


RESNETS, BLOCKS, OVER_FRAMES = 5, 10, 4
REPLACED = {
    groups: {"Block": BLOCKS, "ResnetBlock": RESNETS, "Residual": OVER_FRAMES, "Conv3d": 2},
    focused: {"Block": BLOCKS, "ResnetBlock": RESNETS, "Residual": OVER_FRAMES, "Conv3d": 2},
    all_focused: {"Block": BLOCKS, "ResnetBlock": RESNETS, "Residual": OVER_FRAMES, "Conv3d": 2},
    rms: {"ResnetBlock": RESNETS, "Residual": OVER_FRAMES, "Conv3d": 2 + BLOCKS},
    causal: {"Conv3d": 4, "Residual": 1, "RearrangeTimeCentric": 1},
    both_ways: {"Conv3d": 4, "Residual": 1, "RearrangeTimeCentric": 1},
    frames_apart: {"Conv3d": 4, "Residual": 1, "RearrangeTimeCentric": 1},
}
everywhere = pytest.mark.parametrize("make", REPLACED, ids=lambda make: make.__name__)


@everywhere
def test_output_every_gradient_keys_and_undo(make: Any) -> None:
    model, inputs = make()
    report = contract.hold(model.eval(), inputs)
    assert contract.counts(report) == REPLACED[make]
    assert all(e.why for e in report.refused)


@contract.narrow
@pytest.mark.parametrize("make", [groups, rms, causal], ids=lambda make: make.__name__)
def test_16_bit_weights(make: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubles_imagen, "EPS_OF_THE_ORACLE", 1e-3)
    model, inputs = make()
    contract.hold(model.eval(), inputs, dtype)


def test_what_is_left_alone_has_a_reason() -> None:
    refused = fastvdiff.swap_kernels(rms()[0]).refused
    reasons = {e.path: e.why for e in refused}
    assert "over channels" in reasons["mid_block1.block1"]
    assert "linear attention" in reasons["downs.0.1"]
    assert "not over frames" in reasons["mid_spatial_attn"]
    assert "matrix product" in reasons["final_conv.1"]
    assert contract.refusals(refused) == {"Block": BLOCKS, "Residual": 3, "Conv3d": 1}
    assert contract.refusals(fastvdiff.swap_kernels(causal()[0]).refused) == {"Block": 2}


def test_channels_last_3d() -> None:
    model, inputs = groups()
    inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last_3d)
    contract.hold(model.eval(), inputs)


@pytest.mark.parametrize("make", [groups, rms, causal], ids=lambda make: make.__name__)
def test_training_follows_eager(make: Any) -> None:
    contract.hold_training(lambda: make()[0], make()[1], torch.randn(2, 3, FRAMES, 8, 8))


def test_no_graph_break_is_added() -> None:
    """Eager looks at the mask's values, and breaks there; the kernels take it as it is."""
    model, _ = groups()
    x, bias = torch.randn(2, 16, FRAMES, 4, 4), torch.randn(doubles_vdm.HEADS, FRAMES, FRAMES)
    attention = {"x": x, "pos_bias": bias, "focus_present_mask": torch.tensor([False, True])}
    resnet = {"x": x, "time_emb": torch.randn(2, 32)}
    before = contract.graphs_and_breaks(model.mid_temporal_attn, attention)
    unbroken = contract.graphs_and_breaks(model.mid_block2, resnet)
    fastvdiff.swap_kernels(model)
    assert before[1] > 0
    assert contract.graphs_and_breaks(model.mid_temporal_attn, attention) == (1, 0)
    assert contract.graphs_and_breaks(model.mid_block2, resnet) == unbroken == (1, 0)
    for make in (rms, causal):
        model, inputs = make()
        fastvdiff.swap_kernels(model)
        assert contract.graphs_and_breaks(model, inputs) == (1, 0)


@pytest.mark.parametrize("make", [groups, rms, causal], ids=lambda make: make.__name__)
def test_save_load_and_autocast(make: Any) -> None:
    model, inputs = make()
    contract.hold_round_trip(model, make()[0], inputs)


def test_hooks_and_layers_of_others_are_called() -> None:
    model, inputs = groups()
    attn = model.mid_temporal_attn.fn.fn.fn

    class Low(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean(-1, keepdim=True)

    attn.to_qkv = Low(16, 48, bias=False)
    contract.hold(model.eval(), inputs)
    seen: list[str] = []
    model.init_temporal_attn.fn.norm.register_forward_hook(lambda *a: seen.append("norm"))
    model.mid_block1.block2.norm.register_forward_hook(lambda *a: seen.append("group norm"))
    fastvdiff.swap_kernels(model)
    model(**inputs)
    assert seen == ["norm", "group norm"]


def test_learned_rotary_frequencies_are_refused() -> None:
    model, _ = groups()
    model.init_temporal_attn.fn.fn.fn.rotary_emb.freqs.requires_grad_(True)
    report = fastvdiff.swap_kernels(model)
    assert "Residual" not in contract.counts(report)
    assert any("learned" in e.why for e in report.refused)


def _spec(name: str) -> Any:
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed")
    return spec


def test_video_diffusion_pytorch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    _spec("video_diffusion_pytorch")
    if importlib.util.find_spec("torchvision") is None:
        # Two of its names are taken, for files of pictures.
        vision = types.ModuleType("torchvision")
        vision.transforms, vision.utils = types.SimpleNamespace(ToTensor=object, ToPILImage=object), None
        monkeypatch.setitem(sys.modules, "torchvision", vision)
    library = importlib.import_module("video_diffusion_pytorch")

    def make() -> nn.Module:
        torch.manual_seed(0)
        return library.Unet3D(dim=16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=16)

    inputs = _inputs(time=torch.tensor([7.0, 500.0]), focus_present_mask=torch.tensor([False, True]))
    counts = contract.counts(contract.hold(make().eval(), inputs))
    assert counts["Residual"] == 6
    assert counts["ResnetBlock"] == 11
    assert counts.get("Block", 0) in (0, 22)
    contract.hold_training(make, inputs, torch.randn(2, 3, FRAMES, 8, 8))
    contract.hold_round_trip(make(), make(), inputs)


def test_imagen_pytorch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its video U-Net without the package's __init__, which imports trainers, torchvision and data sets.
    package = importlib.util.module_from_spec(_spec("imagen_pytorch"))
    monkeypatch.setitem(sys.modules, "imagen_pytorch", package)
    t5 = importlib.import_module("imagen_pytorch.t5")
    # It asks for the width of a text encoder as it is imported, and would download a configuration.
    t5.T5_CONFIGS[t5.DEFAULT_T5_NAME] = {"config": types.SimpleNamespace(d_model=768)}
    imagen = importlib.import_module("imagen_pytorch.imagen_video")
    torch.manual_seed(0)
    attention = imagen.Attention(16, dim_head=8, heads=2, causal=True, rel_pos_bias=True)
    positions = nn.Sequential(imagen.Pad((0, 0, 0, 0, 2, 0)), nn.Conv3d(16, 16, (3, 1, 1), groups=16))
    parts = (imagen.RearrangeTimeCentric(imagen.Residual(attention)), imagen.Residual(positions), imagen.Block(16, 16))
    for part, found in zip(parts, ("RearrangeTimeCentric", "Residual", "Conv3d"), strict=True):
        report = contract.hold(part, {"x": torch.randn(2, 16, FRAMES, 8, 8)})
        assert contract.counts(report) == {found: 1}

    def make() -> nn.Module:
        torch.manual_seed(0)
        return imagen.Unet3D(dim=16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8, cond_on_text=False)

    # Its attention to conditions casts to float32, so that the whole has no oracle in float64. At 1e-3 eager itself,
    # begun from parameters changed by 1e-7, is 1 % away after 30 steps.
    inputs = _inputs(time=torch.tensor([0.2, 0.7]))
    report = fastvdiff.swap_kernels(make())
    assert contract.counts(report) == {"Conv3d": 27, "Residual": 6, "RearrangeTimeCentric": 6}
    contract.hold_training(make, inputs, torch.randn(2, 3, FRAMES, 8, 8), lr=2e-4)
    contract.hold_round_trip(make(), make(), inputs)


def test_one_time_step_for_a_batch() -> None:
    contract.hold_one_time_step(*groups(), "time")


def test_autocast_leaves_the_sums_in_float32() -> None:
    x = torch.randn(2, 16, FRAMES, 4, 4)
    contract.hold_autocast_dtypes(groups()[0], {"mid_temporal_attn": (x,)})
    model, _ = causal()
    padded = [path for path, m in model.named_modules() if isinstance(getattr(m, "fn", None), nn.Sequential)]
    inputs = {path: (torch.randn(2, model.get_submodule(path).fn[1].in_channels, FRAMES, 4, 4),) for path in padded}
    assert padded
    contract.hold_autocast_dtypes(model, inputs)


def test_blocks_that_take_no_scale_are_left_alone() -> None:
    """As before video-diffusion-pytorch 0.4.1: the embedding is added."""

    class Block(doubles_vdm.Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    class ResnetBlock(doubles_vdm.ResnetBlock):
        def forward(self, x: torch.Tensor, time_emb: torch.Tensor | None = None) -> torch.Tensor:
            return self.block2(self.block1(x)) + self.res_conv(x)

    block = ResnetBlock(8, 8)
    for part in (block.block1, block.block2):
        part.__class__ = Block
    x = torch.randn(1, 8, 2, 4, 4)
    before = block(x)
    fastvdiff.swap_kernels(block)
    torch.testing.assert_close(block(x), before)
