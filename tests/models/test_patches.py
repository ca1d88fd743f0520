"""Patches and coordinates: what goes where in the channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastvdiff.models.coordinates import FEATURES, CoordinateField, coordinate_features
from fastvdiff.models.patches import patchify, unpatchify


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("shape", [(4, 6, 6), (5, 7, 4), (1, 1, 1)], ids=lambda s: "x".join(map(str, s)))
def test_unpatchify_undoes_patchify(size: int, frames: int, shape: tuple[int, int, int]) -> None:
    x = torch.randn(2, 3, *shape)
    patches = patchify(x, size, frames)
    steps, rows, columns = (-(-n // by) for n, by in zip(shape, (frames, size, size), strict=True))
    assert patches.shape == (2, 3 * frames * size * size, steps, rows, columns)
    assert patches.is_contiguous(memory_format=torch.channels_last_3d)
    back = unpatchify(patches, size, shape, frames)
    assert back.is_contiguous()
    assert torch.equal(back, x)


def test_a_patch_is_one_place_through_its_frames() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 1, 2, 4, 4)
    patches = patchify(x, 2, 2)
    assert torch.equal(patches[0, :, 0, 1, 0], x[0, 0, :, 2:4, 0:2].flatten())


def test_what_is_missing_repeats_the_edge() -> None:
    x = torch.arange(3, dtype=torch.float32).reshape(1, 1, 3, 1, 1)
    assert patchify(x, 1, 2)[0, :, :, 0, 0].tolist() == [[0.0, 2.0], [1.0, 2.0]]


def test_coordinates_are_those_of_the_centres() -> None:
    features = coordinate_features(2, 4, torch.tensor([0, 4, 8]))
    assert features.shape == (3, 2, 4, FEATURES)
    rows, columns, times = features[..., :3].unbind(-1)
    assert rows[0, :, 0].tolist() == [-0.5, 0.5]
    assert columns[2, 1].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert times[:, 0, 0].tolist() == [-1.0, -0.5, 0.0]
    torch.testing.assert_close(
        features[0, 0, 1, 3:12].reshape(3, 3)[1], torch.tensor([-0.25, -0.5, -0.75]).mul(torch.pi / 2).sin()
    )


def test_the_field_starts_at_zero_and_then_depends_on_place_and_text() -> None:
    field, x = CoordinateField(5, 6, 8), torch.randn(2, 5, 3, 2, 4).to(memory_format=torch.channels_last_3d)
    embedding, positions = torch.randn(2, 6), torch.arange(3)
    assert torch.equal(field(x, embedding, positions), x)
    torch.nn.init.normal_(field.linear_out.weight)
    added = field(x, embedding, positions) - x
    assert added.is_contiguous(memory_format=torch.channels_last_3d)
    for one, other in (
        (added[0], added[1]),
        *((added[:, :, *i], added[:, :, -1, -1, -1]) for i in np.ndindex(2, 2, 3)),
    ):
        assert not torch.allclose(one, other, atol=1e-3)
