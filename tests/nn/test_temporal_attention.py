"""TemporalAttention against a plain einops + SDPA rewrite of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from fastvdiff.nn import FrameEmbedding, RelativePositionBias, TemporalAttention, rotary_table

B, C, T, H, W, HEADS, DIM = 2, 24, 6, 3, 5, 3, 16


def plain(module: TemporalAttention, x: torch.Tensor, **positions: Any) -> torch.Tensor:
    """What everybody writes: fold positions into the batch, attend over frames, fold back."""
    y = rearrange(x, "b c t h w -> (b h w) t c")
    y = module.norm(y) if module.norm is not None else y
    if "frame_embedding" in positions:
        y = y + positions["frame_embedding"]
    q, k, v = (rearrange(p(y), "n t (h d) -> n h t d", h=HEADS) for p in (module.to_q, module.to_k, module.to_v))
    if "rotary" in positions:
        cos, sin = positions["rotary"]
        turn = torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))

        def turned(z: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex(z[..., : 2 * cos.shape[1]].unflatten(-1, (-1, 2)).contiguous())
            return torch.cat([torch.view_as_real(pairs * turn).flatten(-2), z[..., 2 * cos.shape[1] :]], dim=-1)

        q, k = turned(q), turned(k)
    allowed = torch.ones(B, T, T, dtype=torch.bool)
    if "attn_mask" in positions:
        mask = positions["attn_mask"]
        allowed = allowed & (mask if mask.dim() == 3 else mask[:, None])
    if positions.get("is_causal"):
        allowed = allowed.tril()
    scores = positions.get("attn_bias", torch.zeros(1, T, T)) + torch.zeros(B, 1, T, T)
    scores = scores.masked_fill(~allowed[:, None], float("-inf")).repeat_interleave(H * W, dim=0)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=scores)
    y = module.to_out[0](rearrange(y, "n h t d -> n t (h d)"))
    return x + rearrange(y, "(b h w) t c -> b c t h w", h=H, w=W)


def encodings(name: str) -> dict[str, Any]:
    positions = torch.arange(T)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 4:] = False
    return {
        "none": {},
        "sinusoidal": {"frame_embedding": FrameEmbedding(C)(positions)},
        "rotary": {"rotary": rotary_table(positions, 8)},
        "relative": {"attn_bias": RelativePositionBias(HEADS)(positions)},
        "causal": {"is_causal": True},
        "padded": {"attn_mask": mask},
        "identity": {"attn_mask": torch.eye(T, dtype=torch.bool).expand(B, T, T)},
    }[name]


@pytest.mark.parametrize("name", ["none", "sinusoidal", "rotary", "relative", "causal", "padded", "identity"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", None])
def test_equals_the_plain_rewrite(name: str, norm: str | None, awake: Callable[[nn.Module], nn.Module]) -> None:
    module = awake(TemporalAttention(C, HEADS, DIM, norm=norm))
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        x, positions = torch.randn(B, C, T, H, W).contiguous(memory_format=memory_format), encodings(name)
        torch.testing.assert_close(module(x, **positions), plain(module, x, **positions), rtol=1e-4, atol=1e-5)


def test_gradients_reach_input_weights_and_bias(awake: Callable[[nn.Module], nn.Module]) -> None:
    module, relative = awake(TemporalAttention(C, HEADS, DIM, bias=True)), RelativePositionBias(HEADS)
    leaves = dict(module.named_parameters()) | dict(relative.named_parameters())
    x = torch.randn(B, C, T, H, W, requires_grad=True)
    cotangent = torch.randn(B, C, T, H, W)
    gradients = []
    for run in (module, lambda x, **k: plain(module, x, **k)):
        y = run(x, attn_bias=relative(torch.arange(T)))
        gradients.append(torch.autograd.grad((y * cotangent).sum(), [x, *leaves.values()]))
    for name, ours, expected in zip(["x", *leaves], *gradients, strict=True):
        # The bias of the keys moves all scores of a query alike: its gradient is zero but for rounding.
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_fresh_module_is_the_identity() -> None:
    x = torch.randn(B, C, T, H, W)
    torch.testing.assert_close(TemporalAttention(C, HEADS, DIM)(x), x)


def test_keys_are_diffusers() -> None:
    from diffusers.models.attention_processor import Attention

    theirs = Attention(query_dim=C, heads=HEADS, dim_head=DIM)
    keys = set(TemporalAttention(C, HEADS, DIM).state_dict()) - {"norm.weight", "norm.bias"}
    assert keys == set(theirs.state_dict())
    TemporalAttention(C, HEADS, DIM, norm=None).load_state_dict(theirs.state_dict())


def test_output_dropout_keeps_the_fused_op(awake: Callable[[nn.Module], nn.Module]) -> None:
    module = awake(TemporalAttention(C, HEADS, DIM, dropout=0.5))
    x = torch.randn(B, C, T, H, W)
    branch = module.eval()(x) - x
    dropped = module.train()(x) - x
    kept = dropped.abs() > 1e-6
    torch.testing.assert_close(dropped[kept], 2 * branch[kept], rtol=1e-3, atol=1e-4)
    assert 0.4 < kept.float().mean() < 0.6


@pytest.mark.parametrize("name", ["none", "rotary", "relative", "causal", "padded", "sinusoidal"])
def test_attention_dropout_says_so_and_means_the_same(name: str, awake: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.warns(UserWarning, match="attention_dropout > 0 trains through F.scaled_dot_product_attention"):
        module = awake(TemporalAttention(C, HEADS, DIM, attention_dropout=0.5))
    x, positions = torch.randn(B, C, T, H, W), encodings(name)
    assert not torch.equal(module(x, **positions), module(x, **positions))
    module.attention_dropout = 1e-9
    torch.testing.assert_close(module.train()(x, **positions), module.eval()(x, **positions), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TemporalAttention(C, 0), "TemporalAttention: heads: expected at least 1, got 0"),
        (lambda: TemporalAttention(C, norm="batch"), "TemporalAttention: norm: expected 'layer_norm'"),
        (
            lambda: TemporalAttention(C)(torch.zeros(1, C + 1, 2, 3, 3)),
            r"x: expected shape .* with C = 24, got \(1, 25",
        ),
        (lambda: TemporalAttention(C)(torch.zeros(1, C, 2, 3)), "x: expected shape"),
    ],
    ids=["heads", "norm", "channels", "dimensions"],
)
def test_bad_arguments(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
