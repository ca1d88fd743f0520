"""VideoUNet under torch.compile: one graph, the same numbers."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastvdiff
from fastvdiff.models import VideoUNet

# Dynamo cannot trace the fixture that poisons torch.empty.
pytestmark = pytest.mark.no_poison

ONE_LEVEL = {
    "channel_multipliers": (1,),
    "temporal_attention_levels": (0,),
    "spatial_attention_levels": (0,),
    "cross_attention_levels": (0,),
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("impl", "settings"),
    [
        (None, {"conv": "factorized", "temporal_position": "rotary+relative", "gradient_checkpointing": True}),
        ("reference", {"patch_size": 2, "cross_frame_attention": True, "feed_forward_mult": 2, **ONE_LEVEL}),
    ],
    ids=["chosen", "reference"],
)
def test_fullgraph(
    impl: str | None,
    settings: dict[str, Any],
    small: Callable[..., VideoUNet],
    call: Callable[..., dict[str, Any]],
) -> None:
    model, arguments = small(**settings), call()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with fastvdiff.use_impl(impl) if impl else contextlib.nullcontext():
        torch.testing.assert_close(compiled(**arguments), model(**arguments), rtol=1e-4, atol=1e-5)
        gradients = [
            torch.autograd.grad(run(**arguments).square().sum(), list(model.parameters())) for run in (model, compiled)
        ]
    for eager, graph in zip(*gradients, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-3 * float(eager.abs().max() + 1e-3))


def test_images_and_return_forms(small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]) -> None:
    model, arguments = small(**ONE_LEVEL), {**call(), "image_only": [True, False], "return_dict": True}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**arguments).sample, model(**arguments).sample, rtol=1e-4, atol=1e-5)


def test_inductor(small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]) -> None:
    model, arguments = small(**ONE_LEVEL).eval(), call()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**arguments), model(**arguments), rtol=1e-4, atol=1e-5)
