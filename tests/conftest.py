"""Fixtures for every test: memory that shows an unwritten element, seeds, and hypothesis without surprises."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_for_numpy(tensor: Any, scope: Any) -> None:
        """Triton 3.6's own patch, whose loop bounds (arrays of one element) numpy 2.4 no longer takes as ints."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = _patch_tensor_for_numpy
    _patch_lang = interpreter._patch_lang

    def _patch_lang_once(function: Any) -> Any:
        """Triton's own patch of its language, not again for every function that a kernel calls: half of the time."""
        language = interpreter.tl
        seen = [module for module in function.__globals__.values() if module is language or module is language.core]
        if any(language.core.is_builtin(module.load) for module in seen):
            return _patch_lang(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = _patch_lang_once
    # Every 32-bit sum and product is checked only where offsets are large (test_large_offsets.py): half of the rest.
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )

# Tests marked `gpu` need torch, triton, numpy and pytest alone; files that need more are left out where it is missing.
_MISSING = [
    name
    for name in ("hypothesis", "diffusers", "transformers", "einops", "av", "PIL")
    if importlib.util.find_spec(name) is None
]
if "hypothesis" not in _MISSING:
    from hypothesis import HealthCheck, Phase, settings

    # Not shrunk: the drawn calls are small, and minutes of smaller ones tell no more about a rounding error.
    settings.register_profile(
        "fastvdiff", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True,
        phases=(Phase.explicit, Phase.generate),
    )  # fmt: skip
    settings.load_profile("fastvdiff")


def pytest_report_header() -> str | None:
    """Say what is left out."""
    return f"not installed, and the test files that import them left out: {', '.join(_MISSING)}" if _MISSING else None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out a file that imports a missing library; None: as pytest decides."""
    if not _MISSING or collection_path.suffix != ".py":
        return None
    imports = rf"^(from|import) ({'|'.join(_MISSING)})\b"
    return True if re.search(imports, collection_path.read_text(), re.MULTILINE) else None


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate`, filled with NaN when fastvdiff's native boundary is the caller."""

    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith(("fastvdiff.native", "fastvdiff.kernels")) and tensor.is_floating_point():
            tensor.fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that a kernel forgets to write reads as NaN."""
    if "no_poison" in request.keywords:
        return
    import torch._dynamo

    # Dynamo looks torch's functions up once, when it is imported or first compiles: it must not find the wrappers.
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves the thread count as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` or `long` say why they are skipped."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False"))
        if "long" in item.keywords and "long" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="a long run: pytest -m long"))
