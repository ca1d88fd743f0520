"""GroupNormSiLU: a GroupNorm with an activation, drop-in."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvdiff.nn import GroupNormSiLU


def test_state_dict_and_repr_are_group_norms() -> None:
    ours, theirs = GroupNormSiLU(4, 8, 1e-6), nn.GroupNorm(4, 8, 1e-6)
    assert isinstance(ours, nn.GroupNorm)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs).replace("GroupNorm", "GroupNormSiLU")
    assert "silu=False" in repr(GroupNormSiLU(4, 8, silu=False))


@pytest.mark.parametrize("shape", [(2, 8, 5), (2, 8, 3, 5), (2, 8, 2, 3, 5)], ids=lambda s: f"{len(s)}d")
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
def test_equals_the_composition(shape: tuple[int, ...], silu: bool) -> None:
    norm = GroupNormSiLU(4, 8, silu=silu)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, scale, shift = torch.randn(shape), torch.randn(2, 8), torch.randn(2, 8)
    ones = (1,) * (len(shape) - 2)
    y = F.group_norm(x, 4, norm.weight, norm.bias)
    y = y * (1 + scale.view(2, 8, *ones)) + shift.view(2, 8, *ones)
    torch.testing.assert_close(norm(x, scale, shift), F.silu(y) if silu else y)


def test_not_affine_has_no_parameters() -> None:
    norm = GroupNormSiLU(2, 4, affine=False)
    assert not list(norm.parameters())
    x = torch.randn(1, 4, 2, 3, 3)
    torch.testing.assert_close(norm(x), F.silu(F.group_norm(x, 2)))


def test_without_bias() -> None:
    norm = GroupNormSiLU(2, 4, bias=False)
    assert set(norm.state_dict()) == {"weight"}
    x = torch.randn(1, 4, 2, 3, 3)
    torch.testing.assert_close(norm(x), F.silu(F.group_norm(x, 2, norm.weight)))


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="divisible"):
        GroupNormSiLU(3, 8)
