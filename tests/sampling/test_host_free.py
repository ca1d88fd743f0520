"""Nothing in the denoising loop copies from the host or waits for the device, shown without a device.

The loop runs on "meta" tensors, which stand for those on a GPU. They have no values: reading one, or a shape that
depends on them, raises by itself; two modes refuse what would copy between the host and the device. Any of it would end
the capture of a CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvdiff import use_impl
from fastvdiff.diffusion import DDIMScheduler, DDPMScheduler
from fastvdiff.models import VideoUNet
from fastvdiff.sampling.denoising import Denoiser, LoopInputs
from tests.small_run import FRAMES, MODEL_CHANGES, SIZE

aten = torch.ops.aten
MOVING = (aten.where, aten._to_copy, aten.copy_)
FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.asarray)
INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
HEIGHT, WIDTH = SIZE + 1, SIZE + 3  # that no level divides


class _Operations(TorchDispatchMode):
    """Fails on an operation between host and device.

    A CPU scalar may meet a device tensor in a pointwise operation, which takes its value along as a kernel's argument;
    `where` moves it, and so does a copy.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        kinds = {x.device.type for x in tensors}
        if tensors:
            kinds |= {x.type for x in leaves if isinstance(x, torch.device)}
        if {"meta", "cpu"} <= kinds:
            scalars = all(x.dim() == 0 for x in tensors if x.device.type == "cpu")
            taken_along = scalars and torch.Tag.pointwise in func.tags and func.overloadpacket not in MOVING
            assert taken_along, f"{func}: a copy between the host and the device"
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Fails on what copies Python's numbers to the device without an operation to be seen on "meta"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        on_device = isinstance(result, torch.Tensor) and result.device.type == "meta"
        if on_device and func in FROM_PYTHON and not isinstance(args[0], torch.Tensor):
            raise AssertionError(f"{func.__name__}(..., device=...): a copy of Python's numbers to the device")
        if func in INDEXING and args[0].device.type == "meta":
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            numbers = any(isinstance(index, (list, np.ndarray)) for index in indices)
            assert not numbers, "an index of Python's numbers: a copy to the device"
        return result


@contextlib.contextmanager
def no_host_copies() -> Iterator[None]:
    """Within the block, a copy between host and device fails."""
    with _Functions(), _Operations():
        yield


MODELS: dict[str, dict[str, Any]] = {
    "sinusoidal": {"temporal_position": "sinusoidal"},
    "relative": {"temporal_position": "rotary+relative"},
    "pooled": {"pooled_text": True, "cross_frame_attention": True, "patch_size": 2},
    "factorized": {"conv": "factorized", "time_conditioning": "add", "feed_forward_mult": 2},
    "full": {"conv": "full", "stem_kernel_size": 7},
}
DDIMS: dict[str, dict[str, Any]] = {
    "v": {"prediction_type": "v_prediction"},
    "threshold": {"thresholding": True},
    "trailing": {"clip_sample": False, "timestep_spacing": "trailing"},
}
DDPMS: dict[str, dict[str, Any]] = {
    "fixed_small": {},
    "fixed_large": {"variance_type": "fixed_large", "thresholding": True},
    "learned": {"variance_type": "learned"},
    "learned_range": {"variance_type": "learned_range", "prediction_type": "sample"},
}


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch knows no autocast on "meta", and raises when asked."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type=None: False)


def run(scheduler: Any, eta: float = 0.0, guided: bool = True, per_frame: bool = False, **changes: Any) -> torch.Tensor:
    """What comes out of three steps."""
    texts = 4 if guided else 2
    if scheduler.config.get("variance_type", "").startswith("learned"):
        changes["out_channels"] = 6
    unet = VideoUNet.from_preset("tiny", **{**MODEL_CHANGES, **changes}).eval().to("meta")
    denoiser = Denoiser.of(unet, scheduler, 3, eta, 0.7 if guided else 0.0)
    sample = torch.empty(2, 3, FRAMES, HEIGHT, WIDTH, device="meta")
    inputs = LoopInputs(
        sample,
        text=torch.empty(texts, 8, 16, device="meta"),
        mask=torch.empty(texts, 8, dtype=torch.bool, device="meta"),
        scale=torch.empty((1, FRAMES) if per_frame else (), device="meta") if guided else None,
        noise=[torch.empty_like(sample) for timestep in denoiser.timesteps if denoiser.adds_noise(timestep)],
    )
    with use_impl("reference"), torch.inference_mode(), no_host_copies():
        return denoiser.run(inputs)


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_model(model: str) -> None:
    result = run(DDIMScheduler(), per_frame=True, **MODELS[model])
    assert (result.device.type, result.shape) == ("meta", (2, 3, FRAMES, HEIGHT, WIDTH))


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("name", DDIMS)
def test_ddim(name: str, eta: float, guided: bool) -> None:
    run(DDIMScheduler(**DDIMS[name]), eta, guided)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("name", DDPMS)
def test_ddpm(name: str, guided: bool) -> None:
    run(DDPMScheduler(**DDPMS[name]), guided=guided)


COPIES: dict[str, Any] = {
    "tensor": lambda x: x + torch.tensor([1.0, 2.0], device="meta"),
    "as_tensor": lambda x: x + torch.as_tensor(1.0, device=x.device),
    "to": lambda x: x + torch.ones(()).to(x.device),
    "copy_": lambda x: x.copy_(torch.zeros(2)),
    "where": lambda x: torch.where(x > 0, torch.zeros(()), x),
    "index": lambda x: x[[1, 0]],
}
WAITS: dict[str, Any] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.any()),
    "mask": lambda x: x[x > 0],
    "nonzero": torch.nonzero,
    "cpu": lambda x: x.cpu(),
}


@pytest.mark.parametrize("name", [*COPIES, *WAITS])
def test_the_guard_sees(name: str) -> None:
    x = torch.empty(2, device="meta")
    if name in COPIES:
        with no_host_copies(), pytest.raises(AssertionError, match="a copy"):
            COPIES[name](x)
    else:
        with no_host_copies(), pytest.raises((AssertionError, RuntimeError)):
            WAITS[name](x)


def test_the_guard_lets_numbers_pass() -> None:
    x = torch.empty(2, device="meta")
    with no_host_copies():
        assert (x[0] * torch.tensor(2.0) + torch.full((2,), 3.0, device="meta")).shape == (2,)
