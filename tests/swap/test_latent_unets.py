"""ModelScope's, VideoCrafter's and Stability's (sgm) U-Nets, as doubles."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fastvdiff
from fastvdiff.swap.attention import over_text
from tests.swap import contract, doubles_lvdm, doubles_modelscope, doubles_sgm

FRAMES = 5


def lvdm(**options: Any) -> tuple[nn.Module, contract.Inputs]:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4, FRAMES, 6, 8), "timesteps": torch.tensor([7, 500]),
              "context": torch.randn(2, 5, 12)}  # fmt: skip
    return doubles_lvdm.UNetModel(**options), inputs


def modelscope(**options: Any) -> tuple[nn.Module, contract.Inputs]:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4, FRAMES, 6, 7), "t": torch.tensor([7, 500]), "y": torch.randn(2, 5, 12)}
    return doubles_modelscope.UNetSD(**options), inputs


def sgm(time_context: torch.Tensor | None = None, **options: Any) -> tuple[nn.Module, contract.Inputs]:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2 * FRAMES, 4, 6, 7), "timesteps": torch.tensor([7, 500]).repeat_interleave(FRAMES),
              "context": torch.randn(2, 3, 12).repeat_interleave(FRAMES, 0), "time_context": time_context,
              "num_video_frames": FRAMES, "image_only_indicator": torch.zeros(2, FRAMES)}  # fmt: skip
    inputs["image_only_indicator"][1, 2] = 1
    return doubles_sgm.VideoUNet(**options), inputs


# in_layers and out_layers of every ResBlock, and the last norm, are found as Sequentials besides.
PLAIN = {"ResBlock": 3, "TemporalTransformer": 1, "Sequential": 7, "GEGLU": 2}
WITH_CONVOLUTIONS = {**PLAIN, "TemporalConvBlock": 3, "Sequential": 19, "Conv3d": 12}
SGM = {"VideoResBlock": 2, "ResBlock": 2, "SpatialVideoTransformer": 1, "AlphaBlender": 3, "Sequential": 9, "GEGLU": 3}
MAKES = {
    "lvdm": (lvdm, PLAIN),
    "lvdm temporal convolutions": (partial(lvdm, use_temporal_conv=True), WITH_CONVOLUTIONS),
    "lvdm 3x3x3": (partial(lvdm, use_temporal_conv=True, tempspatial_aware=True), WITH_CONVOLUTIONS),
    "lvdm scale_shift": (partial(lvdm, use_scale_shift_norm=True, use_checkpoint=True), PLAIN),
    "lvdm causal": (partial(lvdm, transformer={"causal_attention": True}), PLAIN),
    "lvdm linear": (partial(lvdm, transformer={"use_linear": True}), PLAIN),
    "sgm": (partial(sgm, merge_strategy="learned_with_images"), SGM),
    "sgm fixed": (partial(sgm, merge_strategy="fixed", use_checkpoint=True), SGM),
    "sgm 3x3x3": (partial(sgm, video_kernel_size=(3, 3, 3), use_scale_shift_norm=True), SGM),
    "sgm its own context": (
        partial(sgm, torch.randn(2, 12), transformer={"use_spatial_context": False, "use_checkpoint": True}),
        SGM,
    ),
    "sgm convolutions, no context": (
        partial(sgm, transformer={"use_linear": False, "ff_in": False, "disable_temporal_crossattention": True}),
        {**SGM, "GEGLU": 2},
    ),
    "modelscope": (
        modelscope,
        {
            "ResBlock": 2,
            "TemporalTransformer": 1,
            "TemporalConvBlock_v2": 2,
            "Sequential": 13,
            "Conv3d": 8,
            "GEGLU": 2,
        },
    ),
}


@pytest.mark.parametrize("name", MAKES)
def test_output_every_gradient_keys_and_undo(name: str) -> None:
    make, replaced = MAKES[name]
    model, inputs = make()
    report = contract.hold(model.eval(), inputs)
    assert contract.counts(report) == replaced
    # The norm of the spatial transformer, which sgm's replaced one has inside.
    assert contract.refusals(report.refused) == ({} if "VideoResBlock" in replaced else {"GroupNorm": 1})


@contract.mostly_bfloat16
@pytest.mark.parametrize("name", ["lvdm temporal convolutions", "sgm", "modelscope"])
def test_16_bit_weights(name: str, dtype: torch.dtype) -> None:
    model, inputs = MAKES[name][0]()
    contract.hold(model.eval(), inputs, dtype)


def test_learned_relative_positions_are_left_alone_with_the_rest_swapped() -> None:
    model, inputs = lvdm(transformer={"relative_position": True})
    report = contract.hold(model.eval(), inputs)
    assert "TemporalTransformer" not in contract.counts(report)
    assert contract.counts(report)["ResBlock"] == 3
    reasons = {e.what: e.why for e in report.refused}
    assert "learned relative positions" in reasons["TemporalTransformer"]


def test_modules_for_images_are_left_alone() -> None:
    model, inputs = modelscope(use_image_dataset=True)
    report = contract.hold(model.eval(), inputs)
    reasons = {e.what: e.why for e in report.refused}
    assert "multiplied by zero" in reasons["TemporalTransformer"]
    assert "multiplied by zero" in reasons["TemporalConvBlock_v2"]


@pytest.mark.parametrize(
    "make",
    [partial(lvdm, use_temporal_conv=True, use_checkpoint=True), modelscope, sgm],
    ids=["lvdm", "modelscope", "sgm"],
)
def test_training_with_dropout_follows_eager(make: Any) -> None:
    contract.hold_training(lambda: make()[0], make()[1], torch.randn(make()[1]["x"].shape))


@pytest.mark.parametrize(
    "make", [partial(lvdm, use_temporal_conv=True), modelscope, sgm], ids=["lvdm", "modelscope", "sgm"]
)
def test_no_graph_break_is_added(make: Any) -> None:
    model, inputs = make()
    fastvdiff.swap_kernels(model.eval())
    with torch.no_grad():
        assert contract.graphs_and_breaks(model, inputs) == (1, 0)


@pytest.mark.parametrize("make", [lvdm, modelscope, sgm], ids=["lvdm", "modelscope", "sgm"])
def test_save_load_and_autocast(make: Any) -> None:
    contract.hold_round_trip(make()[0], *make())


def test_the_librarys_own_checkpointing_goes_on() -> None:
    """A checkpointed block keeps its input alone, swapped or not."""
    kept = {}
    for checkpointing in (False, True):
        model, inputs = lvdm(use_checkpoint=checkpointing, transformer={"use_checkpoint": checkpointing})
        fastvdiff.swap_kernels(model.eval())
        with (held := contract.Kept()):
            model(**inputs)
        kept[checkpointing] = held.bytes
    assert kept[True] < 0.7 * kept[False]


def test_temporal_layers_recomputed_keep_less() -> None:
    contract.hold_checkpointing(*lvdm(use_temporal_conv=True, transformer={"use_checkpoint": False}))


def test_attention_to_the_context_alone_is_left_alone() -> None:
    model, inputs = sgm(transformer={"disable_self_attn": True})
    report = contract.hold(model.eval(), inputs)
    assert "SpatialVideoTransformer" not in contract.counts(report)
    assert "to the context" in {e.what: e.why for e in report.refused}["SpatialVideoTransformer"]


def test_attention_that_gives_itself_xformers_forward_is_known() -> None:
    class CrossAttention(doubles_lvdm.CrossAttention):
        def efficient_forward(self, x: torch.Tensor, context: Any = None, mask: Any = None) -> torch.Tensor:
            raise AssertionError("not called: the block computes it")

    model, inputs = lvdm()
    with torch.no_grad():
        before = model.eval()(**inputs)
    for attention in (model.blocks[2].transformer_blocks[0].attn1, model.blocks[2].transformer_blocks[0].attn2):
        attention.__class__ = CrossAttention
        attention.forward = attention.efficient_forward
    fastvdiff.swap_kernels(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs), before, rtol=1e-4, atol=1e-5)


def test_a_hook_inside_a_block_is_called() -> None:
    model, inputs = lvdm(use_temporal_conv=True)
    seen: list[str] = []
    model.blocks[2].transformer_blocks[0].attn2.register_forward_hook(lambda *a: seen.append("attention"))
    model.blocks[0].in_layers[0].register_forward_hook(lambda *a: seen.append("norm"))
    with torch.no_grad():
        before = model.eval()(**inputs)
        fastvdiff.swap_kernels(model)
        torch.testing.assert_close(model(**inputs), before, rtol=1e-4, atol=1e-5)
    assert seen == ["norm", "attention"] * 2


def test_one_time_step_for_a_batch() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList([doubles_lvdm.ResBlock(16, 24, 32, use_scale_shift_norm=scaled) for scaled in (True, False)])
    blocks.append(doubles_sgm.ResBlock(16, 24, dims=3, use_scale_shift_norm=True))
    x, emb = torch.randn(3, 16, 6, 8), torch.randn(1, 24)
    calls = [(block, x[:, :, None].expand(-1, -1, 4, -1, -1) if i == 2 else x) for i, block in enumerate(blocks.eval())]
    with torch.no_grad():
        before = [block(x, emb) for block, x in calls]
        fastvdiff.swap_kernels(blocks)
        for (block, x), expected in zip(calls, before, strict=True):
            torch.testing.assert_close(block(x, emb), expected, rtol=1e-4, atol=1e-5)


def test_hooks_on_an_attentions_last_layers_are_called() -> None:
    model, inputs = lvdm()
    attn, seen = model.blocks[2].transformer_blocks[0].attn1, []
    attn.to_out.register_forward_hook(lambda *a: seen.append("sequential"))
    model.blocks[2].transformer_blocks[0].attn2.to_out[1].register_forward_hook(lambda *a: seen.append("dropout"))
    fastvdiff.swap_kernels(model.eval())
    model(**inputs)
    assert seen == ["sequential", "dropout"]


def test_one_key_trains_where_float16_scores_overflow() -> None:
    attn = doubles_lvdm.CrossAttention(16, 12).half()
    h, text = 600 * torch.ones(1, 5, 16).half(), 600 * torch.ones(1, 1, 12).half()
    with torch.no_grad():
        for layer in (attn.to_q, attn.to_k):
            layer.weight.fill_(0.1)
    y = over_text(attn, h, text.requires_grad_())
    grads = torch.autograd.grad(y.float().square().mean(), [text, *attn.parameters()])
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(g).all() for g in grads)
