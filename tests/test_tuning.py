"""Tuning: the fastest candidate with the same result is kept, by device and kernels, and nothing is tuned unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from typer.testing import CliRunner

from fastvdiff import cli, tuned, tuning
from fastvdiff.kernels import launch

SHIPPED = {"FACTOR": 2, "num_warps": 4}
FASTER, FASTEST_BUT_WRONG, SLOWER = (
    {"FACTOR": 2, "num_warps": 2},
    {"FACTOR": 3, "num_warps": 1},
    {**SHIPPED, "num_warps": 8},
)
KEY = ("twice", "any")


@triton.jit
def twice_kernel(x_ptr, y_ptr, FACTOR: tl.constexpr):  # noqa: N803
    i = tl.arange(0, 8)
    tl.store(y_ptr + i, tl.load(x_ptr + i) * FACTOR)


def twice(x: torch.Tensor) -> torch.Tensor:
    """2 x, by a kernel whose candidates are not all right."""
    config = launch.configuration(*KEY, SHIPPED, lambda: (SHIPPED, SLOWER, FASTEST_BUT_WRONG, FASTER))
    y = torch.empty_like(x)
    with launch.on_device(x):
        twice_kernel[(1,)](x, y, **config)
    return y


@pytest.fixture
def x(device: str) -> torch.Tensor:
    return torch.arange(8.0, device=device)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device that tuning takes for a GPU, on which the number of warps is the time."""

    def warps(run: Callable[[], Any]) -> float:
        with launch.recorded() as launches:
            run()
        return float(launches[0].used["num_warps"])

    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuned.verified, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(tuning, "milliseconds", warps)
    yield device
    launch.use_tuned({})


def test_keeps_the_fastest_with_the_same_result(x: torch.Tensor) -> None:
    (found,) = tuning.tune(twice, x)
    assert (found.kernel, found.shape_class, found.shipped, found.best) == (*KEY, SHIPPED, FASTER)
    assert (found.shipped_ms, found.best_ms) == (4.0, 2.0)
    assert list(found.refused) == [str(FASTEST_BUT_WRONG)]
    assert "another result" in found.refused[str(FASTEST_BUT_WRONG)]
    assert tuned.load() == {KEY: FASTER}
    with launch.recorded() as launches:
        assert twice(x).equal(2 * x)
    assert launches[0].used == FASTER


def test_candidates_race_against_what_is_shipped(x: torch.Tensor) -> None:
    launch.use_tuned({KEY: SLOWER})
    assert tuning.tune(twice, x)[0].shipped == SHIPPED


def test_earlier_findings_stay(x: torch.Tensor) -> None:
    other = {("other", "class"): {"num_warps": 1}}
    tuned.save(other)
    tuning.tune(twice, x)
    assert tuned.load() == {**other, KEY: FASTER}


def test_does_not_save_unasked(x: torch.Tensor) -> None:
    tuning.tune(twice, x, save=False)
    assert not tuned.path().exists()


@pytest.mark.parametrize("change", ["device", "version", "kernels"])
def test_holds_only_for_the_same_device_version_and_kernels(x: torch.Tensor, change: str) -> None:
    file = tuned.save({KEY: FASTER})
    record = json.loads(file.read_text())
    record["for"][change] = "another"
    file.write_text(json.dumps(record))
    assert tuned.load() == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"for": 1}'])
def test_a_damaged_record_counts_as_none(x: torch.Tensor, text: str) -> None:
    tuned.path().parent.mkdir(parents=True)
    tuned.path().write_text(text)
    assert tuned.load() == {}


def test_a_failing_call_leaves_the_configurations_as_they_were(x: torch.Tensor) -> None:
    tuned.save({KEY: SLOWER})

    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tuning.tune(fails)
    with launch.recorded() as launches:
        twice(x)
    assert launches[0].used == SLOWER


def test_a_call_without_triton_kernels(x: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"tune: the call launched no Triton kernel: fastvdiff\.explain says"):
        tuning.tune(torch.neg, x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="tune: expected a GPU that torch can use, got none"):
        tuning.tune(twice, torch.zeros(8))
    result = CliRunner().invoke(cli.app, ["tune"])
    assert (result.exit_code, result.stderr) == (
        1,
        "fastvdiff tune: needs a GPU that torch can use; this machine has none\n",
    )


@pytest.mark.parametrize("arguments", [["--level", "svd"], ["--op", "conv"]])
def test_an_unknown_name(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.app, ["tune", *arguments])
    assert result.exit_code == 2
    assert "expected one of" in result.stderr
    assert f"got '{arguments[1]}'" in result.stderr
