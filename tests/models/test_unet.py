"""VideoUNet: every kind of it runs, means the same on the reference, and refuses what does not fit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastvdiff
from fastvdiff.models import VideoUNet, VideoUNetConfig, VideoUNetOutput

KINDS = {
    "default": {},
    "factorized": {"conv": "factorized"},
    "full": {"conv": "full"},
    "rotary": {"temporal_position": "rotary"},
    "relative": {"temporal_position": "relative"},
    "rotary+relative": {"temporal_position": "rotary+relative", "num_heads": None},
    "no-position": {"temporal_position": None},
    "add": {"time_conditioning": "add"},
    "pooled-text": {"pooled_text": True},
    "cross-frame": {"cross_frame_attention": True},
    "feed-forward": {"feed_forward_mult": 2},
    "no-text": {"cross_attention_dim": None},
    "no-attention": {"cross_attention_dim": None, "spatial_attention_levels": (), "temporal_attention_levels": ()},
    "two-blocks": {"blocks_per_level": 2, "channel_multipliers": (1, 2, 2)},
    "one-level": {
        "channel_multipliers": (1,), "temporal_attention_levels": (0,), "spatial_attention_levels": (0,),
        "cross_attention_levels": (0,),
    },
    "patches": {"patch_size": 2, "stem_kernel_size": 5},
    "tubes": {"patch_size": 2, "patch_frames": 2},
    "coordinates": {"coordinates": True},
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


def without_text(model: VideoUNet, arguments: dict[str, Any]) -> dict[str, Any]:
    if model.config.cross_attention_dim is None:
        arguments.pop("encoder_hidden_states")
    return arguments


def outputs_and_gradients(model: VideoUNet, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The prediction, and the gradient of every parameter and floating input under one cotangent."""
    inputs = {k: v.clone().requires_grad_() for k, v in arguments.items() if v.is_floating_point()}
    model.zero_grad()
    y = model(**{**arguments, **inputs})
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    named = {k: v.grad for k, v in (*inputs.items(), *model.named_parameters())}
    return {"prediction": y.detach(), **{k: g.clone() for k, g in named.items() if g is not None}}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Relative to each tensor's norm, and to the largest gradient's where one is all but zero."""
    assert got.keys() == expected.keys()
    largest = max(v.norm() for v in expected.values())
    for name, value in expected.items():
        error = (got[name] - value).norm() / max(value.norm(), 1e-3 * largest)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@every_kind
def test_same_as_on_the_reference(
    kind: str, small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]
) -> None:
    model = small(**KINDS[kind])
    arguments = without_text(model, call())
    ours = outputs_and_gradients(model, arguments)
    assert ours["prediction"].shape == arguments["sample"].shape
    with fastvdiff.use_impl("reference"):
        reference = outputs_and_gradients(model, arguments)
    assert_same(ours, reference, 1e-4)
    assert len(ours) >= len(list(model.parameters())) + 1, "a parameter got no gradient"


@every_kind
def test_checkpointing_changes_nothing(
    kind: str, small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]
) -> None:
    model = small(**KINDS[kind])
    arguments = without_text(model, call())
    expected = outputs_and_gradients(model, arguments)
    model.enable_gradient_checkpointing()
    assert_same(outputs_and_gradients(model, arguments), expected, 1e-6)


def test_checkpointing_recomputes_temporal_attention(
    small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]
) -> None:
    model, calls = small(gradient_checkpointing=True), []
    model.encoder["level0_block0"].temporal.register_forward_pre_hook(lambda *_: calls.append(1))
    y = model(**call())
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2
    model.disable_gradient_checkpointing()
    model(**call()).sum().backward()
    assert len(calls) == 3


def test_checkpointing_recomputes_on_the_implementation_of_the_forward(
    small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]
) -> None:
    """The backward pass comes after the block that asked for the reference, and under another wish."""
    model, arguments = small(), call()
    with fastvdiff.use_impl("reference"):
        expected = outputs_and_gradients(model, arguments)
    model.enable_gradient_checkpointing()
    with fastvdiff.use_impl("reference"):
        y = model(**arguments)
    model.zero_grad()
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 8, 8), (5, 7, 9), (3, 5, 6), (2, 1, 3)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("patch", [(1, 1), (1, 2), (2, 1), (3, 2)], ids=lambda p: f"patch-{p[0]}x{p[1]}")
def test_any_size(
    size: tuple[int, int, int],
    patch: tuple[int, int],
    small: Callable[..., VideoUNet],
    call: Callable[..., dict[str, Any]],
) -> None:
    frames, side = patch
    model = small(patch_frames=frames, patch_size=side, channel_multipliers=(1, 2, 2), coordinates=True)
    arguments = call(1, *size)
    y = model(**arguments)
    assert y.shape == arguments["sample"].shape
    assert torch.isfinite(y).all()


def test_empty_batch(small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]) -> None:
    assert small()(**call(batch=0)).shape == (0, 3, 4, 8, 8)


def test_fresh_model_predicts_zero_and_learns(call: Callable[..., dict[str, Any]]) -> None:
    model = VideoUNet.from_preset("tiny", cross_attention_dim=6)
    y = model(**call(1, 2, 8, 8))
    assert not y.any()
    (y - 1).square().sum().backward()
    assert model.conv_out.weight.grad.any()


def test_timestep_forms(small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]) -> None:
    model, arguments = small().eval(), call()
    arguments["timestep"] = torch.tensor([7, 7])
    expected = model(**arguments)
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0])):
        torch.testing.assert_close(model(**{**arguments, "timestep": timestep}), expected)


def test_return_forms(small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]) -> None:
    model, arguments = small(), call()
    tensor = model(arguments["sample"], arguments["timestep"], arguments["encoder_hidden_states"])
    named = model(**arguments, return_dict=True)
    assert isinstance(named, VideoUNetOutput)
    assert torch.equal(named.sample, tensor)
    (only,) = model(**arguments, return_dict=False)
    assert torch.equal(only, tensor)


def test_memory_format_of_the_sample_does_not_matter(
    small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]
) -> None:
    model, arguments = small(), call()
    expected = model(**arguments)
    assert expected.is_contiguous()
    wide = torch.randn(2, 6, 4, 8, 8)
    wide[:, 1:4] = arguments["sample"]
    for sample in (arguments["sample"].contiguous(memory_format=torch.channels_last_3d), wide[:, 1:4]):
        torch.testing.assert_close(model(**{**arguments, "sample": sample}), expected)


@pytest.mark.parametrize("pooled_text", [False, True], ids=["attended", "pooled-too"])
def test_text_and_its_mask(
    pooled_text: bool, small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]
) -> None:
    model, arguments = small(pooled_text=pooled_text), call()
    expected = model(**arguments)
    assert not torch.allclose(model(**{**arguments, "encoder_hidden_states": torch.randn(2, 5, 6)}), expected)
    for mask in (torch.tensor([[1, 1, 1, 0, 0]] * 2), torch.tensor([[True] * 3 + [False] * 2] * 2)):
        shorter = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"][:, :3]}
        torch.testing.assert_close(
            model(**arguments, encoder_attention_mask=mask), model(**shorter), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "relative"])
def test_frame_positions(position: str, small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]) -> None:
    model, arguments = small(temporal_position=position), call()
    expected = model(**arguments)
    torch.testing.assert_close(model(**arguments, frame_positions=torch.arange(4)), expected)
    apart = model(**arguments, frame_positions=torch.arange(4) * 3)
    assert not torch.allclose(apart, expected)
    shifted = model(**arguments, frame_positions=torch.arange(4) + 5)
    assert torch.allclose(shifted, expected, rtol=1e-3, atol=1e-4) == (position != "sinusoidal")


def test_conditioning_channels(small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]) -> None:
    model, arguments = small(conditioning_channels=2), call()
    first, second = (model(**arguments, conditioning=torch.randn(2, 2, 4, 8, 8)) for _ in range(2))
    assert first.shape == (2, 3, 4, 8, 8)
    assert not torch.allclose(first, second)


def test_relative_bias_is_shared_by_all_layers(small: Callable[..., VideoUNet]) -> None:
    keys = [k for k in small(temporal_position="relative").state_dict() if "relative_attention_bias" in k]
    assert keys == ["frame_positions.biases.2.relative_attention_bias.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype, small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]) -> None:
    model, arguments = small(), call()
    expected = model(**arguments)
    floating = {k: v.to(dtype) if v.is_floating_point() else v for k, v in arguments.items()}
    y = model.to(dtype)(**floating)
    assert y.dtype == dtype
    assert (y - expected).norm() / expected.norm() < (3e-2 if dtype == torch.bfloat16 else 1e-5)


def test_autocast(small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]) -> None:
    model, arguments = small(), call()
    expected = outputs_and_gradients(model, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs_and_gradients(model, arguments)
    assert got["prediction"].dtype == torch.bfloat16
    assert_same(got, expected, 0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sample": "noise"}, TypeError, "sample: expected a tensor, got str"),
        ({"sample": torch.zeros(2, 4, 4, 8, 8)}, ValueError, r"sample: expected shape \(B, 3, T, H, W\), got \(2, 4,"),
        ({"sample": torch.zeros(2, 3, 8, 8)}, ValueError, "sample: expected shape"),
        ({"sample": torch.zeros(2, 3, 0, 8, 8)}, ValueError, "sample: expected at least one frame"),
        ({"sample": torch.zeros(2, 3, 4, 8, 8).half()}, TypeError, "sample: expected torch.float32 as the model's"),
        ({"timestep": torch.zeros(3)}, ValueError, r"timestep: expected a number, or a tensor of shape \(\) or"),
        ({"timestep": "5"}, TypeError, "timestep: expected an int, a float or a tensor, got str"),
        ({"encoder_hidden_states": None}, ValueError, r"encoder_hidden_states: expected the text, shape \(B, L, 6\)"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 7)}, ValueError, r"encoder_hidden_states: expected shape \(B, L"),
        ({"encoder_hidden_states": torch.zeros(1, 5, 6)}, ValueError, "encoder_hidden_states: expected shape"),
        ({"encoder_attention_mask": torch.ones(2, 4)}, ValueError, r"encoder_attention_mask: expected shape \(B, L\)"),
        ({"conditioning": torch.zeros(2, 1, 4, 8, 8)}, ValueError, "conditioning: expected None: the model has no"),
        ({"frame_positions": torch.arange(3)}, ValueError, r"frame_positions: expected shape \(T,\) = \(4,\)"),
        ({"image_only": [True]}, ValueError, "image_only: expected B = 2 bools"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_inputs(
    change: dict[str, Any],
    error: type[Exception],
    message: str,
    small: Callable[..., VideoUNet],
    call: Callable[..., dict[str, Any]],
) -> None:
    with pytest.raises(error, match=f"VideoUNet: {message}"):
        small()(**{**call(), **change})


def test_bad_inputs_of_other_models(small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="encoder_hidden_states: expected None: the model has no cross_attention_dim"):
        small(cross_attention_dim=None)(**call())
    with pytest.raises(ValueError, match=r"conditioning: expected shape \(2, 1, 4, 8, 8\).* got None"):
        small(conditioning_channels=1)(**call())
    with pytest.raises(ValueError, match=r"conditioning: expected shape \(2, 1, 4, 8, 8\), got \(2, 1, 3"):
        small(conditioning_channels=1)(**call(), conditioning=torch.zeros(2, 1, 3, 8, 8))
    with pytest.raises(TypeError, match="VideoUNet: config: expected a VideoUNetConfig"):
        VideoUNet({"base_channels": 8})


def test_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        VideoUNetConfig().base_channels = 3
