"""Embeddings of time and frame index, against diffusers, transformers and closed forms."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers.models import embeddings as diffusers

from fastvdiff.nn import (
    FrameEmbedding,
    RelativePositionBias,
    TimestepEmbedding,
    rotary_table,
    timestep_embedding,
)
from fastvdiff.nn.rotary import apply_rotary


@pytest.mark.parametrize("dim", [6, 7, 32])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_embedding_is_diffusers(dim: int, flip: bool, shift: float) -> None:
    timesteps = torch.tensor([0.0, 0.5, 17.0, 999.0])
    ours = timestep_embedding(timesteps, dim, flip, shift, scale=2, max_period=5000)
    theirs = diffusers.get_timestep_embedding(timesteps, dim, flip, shift, scale=2, max_period=5000)
    assert torch.equal(ours, theirs)


def test_timestep_embedding_module_is_diffusers() -> None:
    ours, theirs = TimestepEmbedding(8, 16, out_dim=12), diffusers.TimestepEmbedding(8, 16, out_dim=12)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_timesteps_must_be_a_vector() -> None:
    with pytest.raises(ValueError, match=r"timesteps: expected shape \(B,\), got \(2, 1\)"):
        timestep_embedding(torch.zeros(2, 1), 8)


def test_frame_embedding_is_the_transformers() -> None:
    theirs = diffusers.SinusoidalPositionalEmbedding(12, max_seq_length=32)
    ours = FrameEmbedding(12)(torch.arange(32))
    torch.testing.assert_close(ours, theirs.pe[0], rtol=1e-5, atol=1e-6)
    assert not FrameEmbedding(12).state_dict()


def test_frame_embedding_between_frames() -> None:
    halves = FrameEmbedding(8)(torch.arange(0, 4, 0.5))
    torch.testing.assert_close(halves[::2], FrameEmbedding(8)(torch.arange(4)))


def test_relative_buckets_are_t5s() -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    bias = RelativePositionBias(2, num_buckets=32, max_distance=32)
    distances = torch.arange(-70, 71)
    expected = t5._relative_position_bucket(distances, bidirectional=True, num_buckets=32, max_distance=32)
    assert torch.equal(bias.buckets(distances), expected)


def test_relative_bias_depends_on_the_distance_alone() -> None:
    module = RelativePositionBias(3)
    bias = module(torch.arange(9))
    assert bias.shape == (3, 9, 9)
    for offset in range(-8, 9):
        diagonal = bias.diagonal(offset, 1, 2)
        assert torch.equal(diagonal, diagonal[:, :1].expand_as(diagonal))
    assert torch.equal(bias, module(torch.arange(5, 14)))
    assert set(module.state_dict()) == {"relative_attention_bias.weight"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_buckets": 6}, "num_buckets: expected a multiple of 4"), ({"max_distance": 8}, "max_distance: expected")],
)
def test_bad_buckets(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelativePositionBias(2, **arguments)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 10)
    cos, sin = rotary_table(torch.arange(6), 8)
    assert cos.shape == sin.shape == (6, 4)
    assert math.isclose(float(cos[3, 0]), math.cos(3), rel_tol=1e-6)
    turned_q, turned_k = (apply_rotary(x.expand(6, 10), (cos, sin)) for x in (q, k))
    scores = turned_q @ turned_k.T
    for offset in range(-5, 6):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned_q[:, 8:], q[8:].expand(6, 2))


@pytest.mark.parametrize("build", [lambda: rotary_table(torch.arange(3), 5), lambda: FrameEmbedding(5)])
def test_odd_dimensions(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="dim: expected an even number"):
        build()
