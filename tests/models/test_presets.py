"""The presets' sizes, without allocating them, and one block of each large one."""

import pytest
import torch

from fastvdiff.models import PRESETS, VideoUNet
from fastvdiff.models.blocks import Conditions, VideoBlock

# The fixture that poisons torch.empty hides it from `torch.device("meta")`, which then allocates.
pytestmark = pytest.mark.no_poison

MILLIONS = {"tiny": 2.946988, "vdm": 57.352067, "latent": 959.303684}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name: str) -> None:
    with torch.device("meta"):
        model = VideoUNet.from_preset(name)
    assert sum(p.numel() for p in model.parameters()) == round(MILLIONS[name] * 1e6)


def test_what_the_issue_asks() -> None:
    vdm, latent, tiny = PRESETS["vdm"], PRESETS["latent"], PRESETS["tiny"]
    assert vdm.level_channels == (64, 128, 256, 512)
    assert all(vdm.heads_of(c) == (8, 32) for c in vdm.level_channels)
    assert (latent.in_channels, latent.out_channels, latent.cross_attention_dim) == (4, 4, 768)
    assert latent.level_channels == (320, 640, 1280, 1280)
    assert [latent.heads_of(c)[0] for c in latent.level_channels] == [5, 10, 20, 20]
    assert (tiny.in_channels, tiny.out_channels, tiny.cross_attention_dim) == (3, 3, 128)


@pytest.mark.parametrize("name", ["vdm", "latent"])
def test_one_block_runs(name: str) -> None:
    config = PRESETS[name]
    block = VideoBlock(config, config.base_channels, level=0).eval()
    text = None if config.cross_attention_dim is None else torch.randn(1, 3, config.cross_attention_dim)
    conditions = Conditions(torch.randn(1, 4 * config.base_channels), text, None, {block.channels: {}})
    with torch.no_grad():
        y = block(torch.randn(1, config.base_channels, 2, 4, 4), conditions)
    assert y.shape == (1, config.level_channels[0], 2, 4, 4)
    assert torch.isfinite(y).all()


def test_overrides_and_unknown_names() -> None:
    model = VideoUNet.from_preset("tiny", cross_attention_dim=None, in_channels=1)
    assert model.config.in_channels == 1
    assert not any(".text." in key for key in model.state_dict())
    with pytest.raises(ValueError, match="name: expected one of tiny, vdm, latent, got 'huge'"):
        VideoUNet.from_preset("huge")
    with pytest.raises(ValueError, match="unknown key 'width'"):
        VideoUNet.from_preset("tiny", width=3)
