"""What every target is held to: numbers, gradients, training, undo, keys and graph breaks."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import fastvdiff
from fastvdiff.swap import SwapReport, classes
from fastvdiff.swap.report import Entry
from fastvdiff.swap.verification import DRAWS, WHOLE_RATIO, root_mean_square, verify
from tests.closeness import FORWARD_RATIO, GRADIENT_SCALE, limit, relative_error

Inputs = dict[str, Any]

narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
mostly_bfloat16 = pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)],
    ids=["bfloat16", "float16"],
)


def sample_of(result: Any) -> torch.Tensor:
    """The tensor of a diffusers output, a tuple or a tensor."""
    if hasattr(result, "sample"):
        return result.sample
    return result[0] if isinstance(result, (tuple, list)) else result


def _gradients(model: nn.Module, inputs: Inputs, seed: int, wide: bool = False) -> dict[str, torch.Tensor]:
    leaves = {}

    def fresh(value: Any) -> Any:
        if not _floating(value):
            return value
        leaf = (value.detach().double() if wide else value.detach().clone()).requires_grad_(True)
        leaves[f"input {len(leaves)}"] = leaf
        return leaf

    torch.manual_seed(11)
    y = sample_of(model(**tree_map(fresh, inputs)))
    leaves |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Rounded to the narrow dtype once, so that every run sees the same numbers.
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(leaves.items(), grads, strict=True)}


def hold(model: nn.Module, inputs: Inputs, dtype: torch.dtype = torch.float32) -> SwapReport:
    """Swap `model` and hold its output and every gradient to float64 beside eager; undo is bitwise; returns the report.

    Parameters are drawn anew, so that layers which start at zero take part; they and the inputs are cast to `dtype`.
    """
    model.to(dtype)
    for module in model.modules():
        if type(module).__name__ in ("GroupNorm32", "GroupNormSpecific"):
            module.float()  # as their libraries leave the norms that compute in float32
    _draw_parameters(model, 7)
    inputs = tree_map(lambda value: value.to(dtype) if _floating(value) else value, inputs)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    with torch.no_grad():
        torch.manual_seed(11)
        inference = sample_of(model(**inputs)), torch.get_rng_state()
    twin = copy.deepcopy(model)
    report = fastvdiff.swap_kernels(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    _hold_gradients(model, twin, inputs, dtype)
    for measured in verify(model, _one_of_each(report), (), inputs, 0.0, whole=False).modules:
        assert not measured.failures, f"{measured.path}: {measured.failures}"
    with torch.no_grad():
        torch.manual_seed(11)
        model(**inputs)
        assert torch.equal(torch.get_rng_state(), inference[1]), "other random numbers were drawn"
    _hold_output(model, twin, inputs, dtype)
    report.undo()
    with torch.no_grad():
        _draw_parameters(model, 7)
        torch.manual_seed(11)
        assert torch.equal(sample_of(model(**inputs)), inference[0]), "undo is not bitwise"
    assert not any(classes.is_swapped(m) for m in model.modules())
    return report


def _draw_parameters(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue  # a constant, such as rotary frequencies, of which the library keeps what it makes
            if p.dim() > 1:
                nn.init.normal_(p, std=p[0].numel() ** -0.5)
            else:
                p.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)


def _hold_output(model: nn.Module, twin: nn.Module, inputs: Inputs, dtype: torch.dtype, draws: int = 12) -> None:
    """The geometric mean error of a swapped `model`'s output over draws of its parameters, beside its eager twin's.

    In one draw the rounding errors of a chain of layers add up or cancel: the ratio to eager's error lay between 0.2
    and 2.1 in an autoencoder where it was 0.9 on average over 16. A badly conditioned draw, whose errors are ten times
    the others', counts no more than another.
    """
    wide = copy.deepcopy(twin).double()
    errors: dict[str, list[float]] = {"eager": [], "recorded": [], "not recorded": []}
    for seed in range(draws):
        for network in (model, twin):
            _draw_parameters(network, seed)
        wide.load_state_dict(twin.state_dict())
        ways = {"eager": (twin, False), "recorded": (model, True), "not recorded": (model, False)}
        with torch.no_grad():
            torch.manual_seed(11)
            oracle = sample_of(wide(**tree_map(_double, inputs)))
        for way, (network, recorded) in ways.items():
            with torch.set_grad_enabled(recorded):
                torch.manual_seed(11)
                y = sample_of(network(**inputs)).detach()
            assert y.shape == oracle.shape
            assert torch.isfinite(y).all()
            errors[way].append(relative_error(y, oracle, 0.0))
    eager, *found = map(_geometric_mean, errors.values())
    for way, error in zip(list(errors)[1:], found, strict=True):
        allowed = limit(eager, dtype, FORWARD_RATIO)
        assert error <= allowed, f"output, {way}: relative error {error:.2e} > {allowed:.2e} (eager's {eager:.2e})"


def _geometric_mean(errors: list[float]) -> float:
    return math.exp(sum(math.log(max(error, 1e-30)) for error in errors) / len(errors))


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _double(value: Any) -> Any:
    return value.double() if _floating(value) else value


def _hold_gradients(model: nn.Module, twin: nn.Module, inputs: Inputs, dtype: torch.dtype) -> None:
    """Every gradient of a swapped network is as far from float64 as its eager twin's worst, within WHOLE_RATIO.

    In a deep network an error is what every layer above has lost, in one draw; a wrong formula shows as 1e-3 and more.
    The contract itself is held module by module, on the inputs that the network gives each (`verify`).
    """
    wide, drawn = copy.deepcopy(twin).double(), []
    for seed in range(DRAWS):
        oracle = _gradients(wide, inputs, seed, wide=True)
        found = [_gradients(network, inputs, seed) for network in (twin, model)]
        least = GRADIENT_SCALE * max(float(g.norm()) for g in oracle.values())
        drawn.append({n: tuple(relative_error(f[n], g, least) for f in found) for n, g in oracle.items()})
        errors = root_mean_square(drawn)
        allowed = limit(max(eager for eager, _ in errors.values()), dtype, WHOLE_RATIO)
        failures = [f"{n}: {error:.2e} > {allowed:.2e}" for n, (_, error) in errors.items() if not error <= allowed]
        if not failures and seed in (0, DRAWS - 1):
            return
    raise AssertionError(f"gradients: {failures}")


def _one_of_each(report: SwapReport) -> dict[str, nn.Module]:
    """The first replaced module of every class."""
    first: dict[str, str] = {}
    for entry in report.replaced:
        first.setdefault(entry.what, entry.path)
    return {path: report.model.get_submodule(path) for path in first.values() if path}


def counts(report: SwapReport) -> dict[str, int]:
    """Class name -> how many of it were replaced."""
    found: dict[str, int] = {}
    for entry in report.replaced:
        found[entry.what] = found.get(entry.what, 0) + 1
    return found


def refusals(refused: list[Entry]) -> dict[str, int]:
    """Class name -> how many of it were left alone."""
    return dict(Counter(entry.what for entry in refused))


def hold_round_trip(model: nn.Module, other: nn.Module, inputs: Inputs) -> None:
    """A swapped state_dict loads into an eager twin, the whole goes through a file, and autocast gives alike."""
    model.eval()
    other.eval()
    fastvdiff.swap_kernels(model)
    other.load_state_dict(model.state_dict())
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert not any(classes.is_swapped(m) for m in loaded.modules())
    with torch.no_grad():
        swapped, eager = sample_of(model(**inputs)), sample_of(other(**inputs))
        assert torch.equal(sample_of(loaded(**inputs)), eager)
        torch.testing.assert_close(swapped, eager, rtol=1e-4, atol=1e-4)
    _hold_autocast(model, other, inputs)


def _hold_autocast(model: nn.Module, other: nn.Module, inputs: Inputs, draws: int = 8) -> None:
    """Under autocast a swapped `model` is as near to float32 as `other`, in the geometric mean over draws.

    In one draw of an autoencoder the ratio lay between 0.4 and 2.5, over 24 of them at 1.05.
    """
    errors: tuple[list[float], list[float]] = ([], [])
    for seed in range(draws):
        for network in (model, other):
            _draw_parameters(network, seed)
        with torch.no_grad():
            exact = sample_of(other(**inputs))
            with torch.autocast("cpu", torch.bfloat16):
                found = [sample_of(network(**inputs)) for network in (model, other)]
        assert found[0].dtype == found[1].dtype
        for of_network, y in zip(errors, found, strict=True):
            of_network.append(relative_error(y, exact.double(), 0.0))
    swapped, eager = map(_geometric_mean, errors)
    assert swapped <= 1.5 * eager + 2e-3, f"under autocast: relative error {swapped:.2e}, eager's {eager:.2e}"


def hold_saved(
    model: nn.Module, inputs: Inputs, folder: Path, around: Callable[[nn.Module], nn.Module] = lambda model: model
) -> None:
    """A swapped diffusers `model` is saved and loaded as the eager one that it was, and loads what that one saves.

    `around(model)` is called on `inputs` where the model itself takes something else.
    """
    kind = type(model.eval())
    with torch.no_grad():
        before = sample_of(around(model)(**inputs))
        fastvdiff.swap_kernels(model).model.save_pretrained(folder / "swapped")
        loaded = kind.from_pretrained(folder / "swapped").eval()
        assert type(loaded) is kind
        assert not any(classes.is_swapped(m) for m in loaded.modules())
        assert torch.equal(sample_of(around(loaded)(**inputs)), before)
        _draw_parameters(loaded, 7)
        loaded.save_pretrained(folder / "eager")
        model.load_state_dict(kind.from_pretrained(folder / "eager").state_dict())
        expected, y = sample_of(around(loaded)(**inputs)), sample_of(around(model)(**inputs))
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def hold_one_time_step(model: nn.Module, inputs: Inputs, name: str) -> None:
    """A network called with one time step for its whole batch, as samplers do, which eager broadcasts."""
    one = {**inputs, name: inputs[name][:1]}
    with torch.no_grad():
        before = sample_of(model.eval()(**one))
        fastvdiff.swap_kernels(model)
        torch.testing.assert_close(sample_of(model(**one)), before, rtol=1e-4, atol=1e-5)


def hold_autocast_dtypes(model: nn.Module, calls: dict[str, tuple[Any, ...]]) -> None:
    """Each module returns the dtype of its own forward where a float32 input meets bfloat16 autocast."""
    dtypes = []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            dtypes.append({path: model.get_submodule(path)(*arguments).dtype for path, arguments in calls.items()})
        fastvdiff.swap_kernels(model)
    assert dtypes[0] == dtypes[1]


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """What autograd keeps for the backward."""

    def __init__(self) -> None:
        super().__init__(self.pack, lambda t: t)
        self.bytes = 0

    def pack(self, t: torch.Tensor) -> torch.Tensor:
        """Count a tensor that is kept."""
        self.bytes += t.nbytes
        return t


def _step(model: nn.Module, inputs: Inputs) -> tuple[int, list[torch.Tensor]]:
    """The bytes that a training step keeps, and its gradients."""
    torch.manual_seed(2)
    with (held := Kept()):
        loss = sample_of(model(**inputs)).square().mean()
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return held.bytes, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def hold_checkpointing(model: nn.Module, inputs: Inputs) -> None:
    """`gradient_checkpointing=True` keeps less and gives the same gradients, dropout and all."""
    steps = {}
    for checkpointing in (False, True):
        report = fastvdiff.swap_kernels(model.train(), gradient_checkpointing=checkpointing)
        steps[checkpointing] = _step(model, inputs)
        report.undo()
    assert steps[True][0] < steps[False][0]
    for a, b in zip(steps[True][1], steps[False][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def hold_own_checkpointing(model: nn.Module, inputs: Inputs, library: nn.Module, before: bool) -> None:
    """diffusers' own checkpointing of `library`, switched on `before` or after the swap: the same gradients, less kept.

    Undone, the checkpointed gradients are eager's, bit for bit.
    """
    library.enable_gradient_checkpointing()
    eager = _step(model.train(), inputs)[1]
    if not before:
        library.disable_gradient_checkpointing()
    report = fastvdiff.swap_kernels(model)
    library.enable_gradient_checkpointing()
    checkpointed = _step(model, inputs)
    library.disable_gradient_checkpointing()
    plain = _step(model, inputs)
    assert checkpointed[0] < 0.6 * plain[0]
    for a, b in zip(checkpointed[1], plain[1], strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(plain[1], eager, strict=True))
    library.enable_gradient_checkpointing()
    report.undo()
    for a, b in zip(_step(model, inputs)[1], eager, strict=True):
        assert torch.equal(a, b)


def losses(model: nn.Module, inputs: Inputs, target: torch.Tensor, steps: int = 32, lr: float = 1e-3) -> list[float]:
    """The losses of `steps` steps of AdamW towards `target`, dropout and all."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    model.train()
    found = []
    for _ in range(steps):
        loss = (sample_of(model(**inputs)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def hold_training(make: Callable[[], nn.Module], inputs: Inputs, target: torch.Tensor, lr: float = 1e-3) -> None:
    """32 steps with the kernels give eager's losses to 1e-3, and fall."""
    before = losses(make(), inputs, target, lr=lr)
    model = make()
    fastvdiff.swap_kernels(model)
    after = losses(model, inputs, target, lr=lr)
    assert after[-1] < 0.98 * after[0]
    for step, (a, b) in enumerate(zip(after, before, strict=True)):
        assert abs(a - b) <= 1e-3 * abs(b), f"step {step}: loss {a}, eager's {b}"


def graphs_and_breaks(model: nn.Module, inputs: Inputs) -> tuple[int, int]:
    """How many graphs torch.compile makes of a call, and how many breaks there are between them."""
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(**inputs)
    torch._dynamo.reset()
    return explained.graph_count, explained.graph_break_count
