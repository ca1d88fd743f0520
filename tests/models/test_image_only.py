"""Joint image-video training: a flagged sample is a stack of images, and nothing mixes them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastvdiff.models import VideoUNet


@pytest.fixture(params=["spatial", "factorized", "full"])
def model(request: pytest.FixtureRequest, small: Callable[..., VideoUNet]) -> VideoUNet:
    """Everything that could mix frames: temporal convolution and attention, cross-frame attention, group norms."""
    return small(conv=request.param, cross_frame_attention=True)


def test_images_do_not_see_each_other(model: VideoUNet, call: Callable[..., dict[str, Any]]) -> None:
    arguments = call()
    before = model(**arguments, image_only=[False, True])
    arguments["sample"][1, :, 2] += 1
    changed = (model(**arguments, image_only=[False, True]) - before).abs().amax(dim=(1, 3, 4))
    assert changed[1, 2] > 1e-3
    assert not changed[0].any()
    assert not changed[1, [0, 1, 3]].any()


def test_frames_of_a_clip_do(model: VideoUNet, call: Callable[..., dict[str, Any]]) -> None:
    arguments = call()
    before = model(**arguments, image_only=[False, True])
    arguments["sample"][0, :, 2] += 1
    changed = (model(**arguments, image_only=[False, True]) - before).abs().amax(dim=(1, 3, 4))
    assert (changed[0] > 1e-6).all()
    assert not changed[1].any()


def test_an_image_is_a_clip_of_one_frame(model: VideoUNet, call: Callable[..., dict[str, Any]]) -> None:
    arguments = call(batch=3)
    mask = torch.rand(3, 5) > 0.3
    mask[:, 0] = True
    mixed = model(**arguments, encoder_attention_mask=mask, image_only=torch.tensor([True, False, True]))
    clips = model(**arguments, encoder_attention_mask=mask)
    torch.testing.assert_close(mixed[1], clips[1], rtol=1e-4, atol=1e-5)
    for t in range(4):
        one = {**arguments, "sample": arguments["sample"][:, :, t : t + 1], "encoder_attention_mask": mask}
        torch.testing.assert_close(mixed[::2, :, t], model(**one)[::2, :, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flag", [False, True])
def test_all_alike(flag: bool, small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]) -> None:
    model, arguments = small(), call()
    y = model(**arguments, image_only=[flag, flag])
    assert y.shape == arguments["sample"].shape
    assert torch.allclose(y, model(**arguments)) != flag


def test_gradients_flow_through_both(small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]) -> None:
    model, arguments = small(), call()
    arguments["sample"].requires_grad_()
    model(**arguments, image_only=[False, True]).square().sum().backward()
    assert all(arguments["sample"].grad[i].any() for i in range(2))
    assert all(p.grad is not None for p in model.parameters())
