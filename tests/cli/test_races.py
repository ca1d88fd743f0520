"""The races of `fastvdiff verify`, and what dispatch makes of them: the kernels on the SIMT shim."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastvdiff import dispatch, ops, verified
from fastvdiff.cli import races, verify
from fastvdiff.cli.examples import EXAMPLES
from fastvdiff.ops import registration
from fastvdiff.ops.conv3d_facts import race_class
from tests.simt.conv3d_library import shim
from tests.simt.host import require_shim

KERNELS = {"conv3d.cuda", "norm_silu_conv3d.cuda"}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(races, "SIZES", {channels: (1, channels, 1, 2, 2) for channels in (64, 320, 1280)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dispatch.recall()
    yield
    monkeypatch.undo()
    dispatch.recall()


@pytest.fixture
def _on_shim() -> Iterator[None]:
    require_shim()
    with shim():
        yield


def facts(contest: races.Contest) -> dispatch.Facts:
    args, named = contest.make("cpu")
    with torch.set_grad_enabled(contest.training):
        return dispatch.trace(getattr(ops, contest.op), *args, **named, impl="reference")[0].facts


@pytest.mark.parametrize("op", ["conv3d", "norm_silu_conv3d"])
def test_each_contest_stands_for_a_class_of_its_own(op: str) -> None:
    (kernel,) = (impl for impl in dispatch.ops()[op] if impl.name == "cuda")
    classes = [kernel.raced(facts(contest)) for contest in races.contests(op)]
    assert len(set(classes)) == len(classes) == 4 * 3 * 2 * 2 * 2 * 2
    assert "others" not in classes


FEW = {"weight": torch.zeros(64, 3, 1, 3, 3), "x": torch.zeros(1, 3, 4, 4, 4)}


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}, FEW], ids=["strided", "dilated", "3 channels"])
def test_what_is_never_raced(options: dict[str, Any]) -> None:
    call = {"x": torch.zeros(1, 64, 4, 4, 4), "weight": torch.zeros(64, 64, 1, 3, 3), "padding": 1} | options
    assert race_class(dispatch.trace(ops.conv3d, **call)[0].facts) == "others"


def contest(op: str = "conv3d", **options: Any) -> races.Contest:
    plain = {"kernel": (1, 1, 1), "channels": 64, "channels_last": True, "numbers": "bfloat16", "sums": False,
             "training": False}  # fmt: skip
    return races.Contest(op, races._OTHERWISE[op], **(plain | options))


@pytest.mark.usefixtures("_on_shim")
def test_a_kernel_runs_by_itself_in_the_classes_that_it_has_won(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, wide = contest(), contest(channels=320)
    monkeypatch.setattr(races, "race", lambda other, kernel, seconds: (2.0, 1.0))
    record = races.won([races.run(plain, "cuda", "cpu")])
    verified.save("cpu", KERNELS, record)
    dispatch.recall()

    def chosen(of: races.Contest) -> dispatch.Walk:
        args, named = of.make("cpu")
        with torch.no_grad():
            return dispatch.trace(ops.conv3d, *args, **named)[0]

    assert chosen(plain).chosen == "cuda"
    assert chosen(wide).chosen == "reference"
    assert chosen(wide).reasons["cuda"] == (
        "has not won the race on this device: 1x1x1, 192 to 479 channels, channels_last, 16 bits, no sums, forward"
    )


@pytest.mark.usefixtures("_on_shim")
def test_only_what_an_implementation_takes_is_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "on_sm90a", lambda facts: None)
    assert contest().takes("cuda", "cpu")
    assert contest(numbers="tf32").takes("cuda", "cpu")
    assert not contest(numbers="tf32").takes("cuda_sm90", "cpu")
    assert not contest(channels_last=False).takes("cuda_sm90", "cpu")


@pytest.mark.usefixtures("_on_shim")
def test_a_narrow_lead_is_no_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(races, "race", lambda other, kernel, seconds: (1.0, 0.98))
    assert races.won([races.run(contest(), "cuda", "cpu")]) == []


@pytest.mark.usefixtures("_on_shim")
def test_both_sides_compute_the_same() -> None:
    for op in ("conv3d", "norm_silu_conv3d"):
        of = contest(op, sums=True)
        args, named = of.make("cpu")
        with torch.no_grad():
            kernel = getattr(ops, op)(*args, **named, impl="cuda")
            with dispatch.use_impl("reference"):
                other = of.otherwise(*args, **named)
        torch.testing.assert_close(kernel, other, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("_on_shim")
def test_verify_records_what_was_won(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []

    def times(other: Any, kernel: Any, seconds: float) -> tuple[float, float]:
        """The convolution wins; by the time that the norm's is raced, it is what the other side runs."""
        kernel()
        seen.extend(walk.chosen for walk in dispatch.trace(other) if walk.op == "conv3d")
        return 1.0, 0.5

    def grid(op: str) -> list[races.Contest]:
        return [contest(op, sums=s, training=t) for t in (False, True) for s in (False, True)]

    monkeypatch.setattr(races, "race", times)
    monkeypatch.setattr(races, "contests", grid)
    console = Console(file=io.StringIO(), width=200)
    # Gradients pass through the norm's own kernel as well, which this shim does not hold: forward only.
    monkeypatch.setattr(races.Contest, "call", lambda self, run, args, named: lambda: run(*args, **named))
    verified.save("cpu", KERNELS, verify._races(console, KERNELS))
    assert seen == ["reference"] * 4 + ["cuda"] * 4
    (device,) = json.loads((tmp_path / "fastvdiff" / "verified.json").read_text())["devices"].values()
    assert set(device["passed"]) == KERNELS
    assert len(device["won"]) == 8
    assert "2.00x*" in console.file.getvalue()


def test_what_loses_its_races_is_not_used_by_itself() -> None:
    """Unless committed results of the architecture say that it is right to."""

    def outcomes(op: str, impl: str, *milliseconds: float) -> list[verify.Outcome]:
        example = next(e for e in EXAMPLES if e.op == op)
        return [verify.Outcome(example, impl, [], (1.0, math.nan), (ms, math.nan)) for ms in milliseconds]

    assert verify._slow(outcomes("ddim_step", "triton", 4.0, 0.5)) == {"ddim_step.triton"}
    assert verify._slow(outcomes("ddim_step", "triton", 2.0, 0.4)) == set()
    assert verify._slow(outcomes("conv3d", "cuda", 2.0)) == set()
    here = verified.architecture("cpu") in dispatch.ops()["ddim_step"][0].verified
    assert verify._slow(outcomes("ddim_step", "cpu", 2.0)) == (set() if here else {"ddim_step.cpu"})
