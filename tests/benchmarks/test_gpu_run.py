"""The GPU's cases at small sizes on the CPU: the check against float64, who takes part, and the rows that come out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks import chunked, gpu_cases, gpu_run
from benchmarks.device_race import DeviceRace
from benchmarks.gpu_case import GpuCase
from benchmarks.limits import DEVICES
from fastvdiff import dispatch
from tests.benchmarks.fake_device import FakeDevice
from tests.benchmarks.small_cases import LEVEL, cases


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces a case, and no interpreted kernels, nor a CPU's other ones: they have tests of their own."""
    native = {op: tuple(i for i in impls if i.name in ("cpu", "reference")) for op, impls in dispatch.ops().items()}
    monkeypatch.setattr(dispatch, "ops", lambda: native)
    monkeypatch.setattr(chunked, "PIECE", 2500)


def race(rounds: int) -> Any:
    def drive(race: DeviceRace) -> None:
        for _ in range(rounds):
            race.round()

    return drive


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_right_case_is_raced(case: GpuCase) -> None:
    rows = gpu_run.measure(
        case, case.draw("cpu"), FakeDevice(), DEVICES["h200"], compiled=False, drive=race(3)
    )  # fmt: skip
    assert [row.impl for row in rows] == ["reference" if case.op == "conv3d" else "cpu"]
    row = rows[0]
    assert row.correct
    assert {"eager", "fastvdiff"} <= set(row.times)
    assert ("eager channels_last" in row.times) == (not case.channels_last and case.op != "geglu")  # rows of tokens
    assert ("eager contiguous" in row.times) == (case.channels_last and case.op.endswith("conv3d"))
    assert row.device.checked.startswith("all elements")
    assert row.device.peak_bytes.keys() == row.device.result_bytes.keys() == row.times.keys()
    assert len(set(row.device.result_bytes.values())) == 1  # everybody gives back the same
    assert row.device.warm.keys() == row.times.keys()  # these tensors fit into any L2
    assert row.device.bytes_moved == case.work.moved
    if case.training:
        assert row.device.checked.count("gradient") == len(
            [t for t in case.leaves(case.draw("cpu")) if t.requires_grad]
        )


@pytest.mark.parametrize("case", cases()[:4], ids=lambda case: case.name)
def test_pieces_check_every_element_once(case: GpuCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong element anywhere is found, in one piece or in several."""
    tensors = case.draw("cpu")
    assert "pieces" in chunked.check(case, tensors, "reference")
    size = chunked.first(case.fast(*tensors, impl="reference")).numel()
    for where in (0, size // 2, size - 1):

        def fast(*given: Any, where: int = where, **named: Any) -> torch.Tensor:
            y = case.fast(*given, **named).clone(memory_format=torch.contiguous_format)
            y.view(-1)[where] += 30
            return y

        with pytest.raises(chunked.Wrong, match="output: relative error"):
            chunked.check(dataclasses.replace(case, fast=fast), tensors, "reference")


def test_a_gradient_that_pieces_share_is_summed() -> None:
    """The bias of attention gets its gradient from every position: half of it is wrong."""
    case = gpu_cases._temporal_attention(LEVEL, True, True, False)

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad / 2

    def fast(q: Any, k: Any, v: Any, bias: Any, *rest: Any, impl: str) -> torch.Tensor:
        return case.fast(q, k, v, Halved.apply(bias), *rest, impl=impl)

    with pytest.raises(chunked.Wrong, match=r"gradient 3: relative error 5\.0"):
        chunked.check(dataclasses.replace(case, fast=fast), case.draw("cpu"), "cpu")


def test_a_nan_never_passes() -> None:
    case = cases()[0]
    broken = dataclasses.replace(case, fast=lambda *t, impl: case.fast(*t, impl=impl) * float("nan"))
    with pytest.raises(chunked.Wrong, match="nan"):
        chunked.check(broken, case.draw("cpu"), "cpu")


def test_a_wrong_case_is_failed_and_has_no_time() -> None:
    case = cases()[0]
    broken = dataclasses.replace(case, fast=lambda *t, impl: 1.5 * case.fast(*t, impl=impl))
    rows = gpu_run.measure(
        broken, case.draw("cpu"), FakeDevice(), DEVICES["h200"], compiled=False, drive=race(3)
    )  # fmt: skip
    assert [(row.correct, row.times) for row in rows] == [(False, {})]
    assert "relative error" in rows[0].failure


def test_every_implementation_has_a_row_beside_the_same_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is wrong, one declines: the others are measured all the same, in one race."""
    case = cases()[0]
    names = ("cuda", "triton", "cpu")
    impls = tuple(dispatch.Impl(n, lambda facts: None, lambda: None) for n in (*names, "reference"))
    monkeypatch.setattr(dispatch, "ops", lambda: {case.op: impls})

    def fast(*tensors: torch.Tensor, impl: str) -> torch.Tensor:
        if impl == "cpu":
            raise NotImplementedError(
                "group_norm_silu: impl='cpu' does not run this call (cpu: no; reference: supported)"
            )
        return case.fast(*tensors, impl="cpu") * (2 if impl == "triton" else 1)

    other = dataclasses.replace(case, fast=fast)
    rows = gpu_run.measure(
        other, case.draw("cpu"), FakeDevice(), DEVICES["h200"], compiled=False, drive=race(2)
    )  # fmt: skip
    assert [(row.impl, row.correct) for row in rows] == [("triton", False), ("cuda", True)]
    assert set(rows[1].times) == {"eager", "fastvdiff"}
    assert rows[1].device.refused == {"fastvdiff cpu": "no"}


def test_without_a_drive_nothing_is_timed() -> None:
    device = FakeDevice()
    assert gpu_run.measure(
        cases()[0], cases()[0].draw("cpu"), device, DEVICES["h200"], compiled=False, drive=None
    ) == []  # fmt: skip
    assert device.log == []


def test_who_declines_is_kept_with_its_sentence() -> None:
    case = gpu_cases._temporal_attention(LEVEL, True, False, False)
    rows = gpu_run.measure(
        case, case.draw("cpu"), FakeDevice(), DEVICES["h200"], compiled=False, drive=race(2)
    )  # fmt: skip
    refused = rows[0].device.refused
    assert "sdpa-cudnn" in refused
    assert "sdpa-cudnn core" in refused
    assert "sdpa-cudnn" not in rows[0].times
    assert "mask" in refused["sdpa-flash"]  # the reason, which torch gives as a warning, not only "no kernel"


def test_every_warning_of_a_backend_is_heard_every_time() -> None:
    before = torch.is_warn_always_enabled()
    case = gpu_cases._temporal_attention(LEVEL, True, False, False)
    found = [gpu_run.invite(case, case.draw("cpu"), [], False).refused["sdpa-flash"] for _ in range(2)]
    assert found[0] == found[1]
    assert torch.is_warn_always_enabled() == before


def test_a_sentence_leaves_out_the_backends_that_were_switched_off() -> None:
    said = [
        "Memory efficient kernel not used because: (Triggered internally at x.cpp:1)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at x.cpp:2)",
        "Flash attention kernel not used because: (Triggered internally at x.cpp:3)",
        "Flash Attention does not support non-null attn_mask. (Triggered internally at x.cpp:4)",
    ]
    assert gpu_run._sentence(RuntimeError("No available kernel."), said) == (
        "No available kernel. Flash attention kernel not used because:"
        " Flash Attention does not support non-null attn_mask."
    )


def test_an_implementation_declines_in_its_own_words() -> None:
    error = NotImplementedError(
        "temporal_attention: impl='triton' does not run this call (cpu: runs on CPU tensors, not cuda;"
        " triton: up to 256 frames, not 300; reference: supported)"
    )
    assert gpu_run._own_reason(error, "triton") == "up to 256 frames, not 300"
    assert gpu_run._own_reason(error, "cpu") == "runs on CPU tensors, not cuda"
    assert gpu_run._own_reason(error, "reference") == "supported"
