"""Every goal of benchmarks/targets.py beside what the committed results say: met, missed and by how much, or owed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import cases, cudnn, gpu_cases, published
from benchmarks.limits import DEVICES, floor
from benchmarks.record import Record
from benchmarks.sdpa import CORE
from benchmarks.targets import TARGETS, Target

_H200 = DEVICES["h200"]
_AUTOTUNED = "torch.compile max-autotune"
Case = dict[str, Any]
_KNOWN = {
    "cuda": {case.name: case.op for case in (*gpu_cases.CASES, *published.NETWORKS)},
    "cpu": {case.name: case.op for case in cases.CASES},
}


@dataclass(frozen=True)
class Finding:
    """What one case says about a goal; `value` None: nothing that may be called a result, and `why`."""

    case: str
    value: float | None
    goal: float
    at_most: bool
    why: str = ""

    @property
    def short(self) -> float:
        """The share of the goal that is missing; not above 0 where it is met. Of a goal of 0, what is above it."""
        if self.value is None:
            return float("inf")
        if self.goal == 0:
            return self.value
        return self.value / self.goal - 1 if self.at_most else 1 - self.value / self.goal


def page(records: Sequence[Record]) -> str:
    """The document."""
    lines = [
        "# Goals",
        "",
        "Written by `python -m benchmarks.report` from `benchmarks/targets.py` and the committed results. A goal over"
        " several cases is met when its worst case meets it, each case by its fastest implementation that is right."
        ' "Owed" is what no committed result says.',
    ]
    for device, heading, more in (
        ("cuda", "On a GPU", " Goals and limits are an H200's; elsewhere a goal is the same share of the device's own"
         " measured rates. A limit is the time of the bytes that the kernel moves, and of the least that any must, or"
         " the rate of the matrix units."),
        ("cpu", "On a CPU", ""),
    ):  # fmt: skip
        here = [r for r in records if ("backend" in r) == (device == "cuda")]
        none = "" if here else " No result of such a device is committed: all of it is owed."
        lines += ["", f"## {heading}", "", *([(more + none).strip(), ""] if more + none else []), *_table(device, here)]
    return "\n".join(lines) + "\n"


def _table(device: str, records: Sequence[Record]) -> list[str]:
    lines = ["| op | goal | target | limit | device | measured | |", "|---|---|---:|---:|---|---:|---|"]
    for target in TARGETS:
        if target.device == device:
            head = f"| {target.op} | {target.goal} | {_goal(target)} | {_limit(target)} |"
            rows = [(record, found) for record in records if (found := findings(target, record))]
            lines += [f"{head} {_name(record)} | {_measured(target, found)} | {_verdict(target, found)} |"
                      for record, found in rows] or [f"{head} | | owed |"]  # fmt: skip
    return lines


def findings(target: Target, record: Record) -> list[Finding]:
    """One for each of the goal's cases in a device's results."""
    rows: dict[str, list[Case]] = {}
    for case in record["cases"]:
        if target.covers(case["op"], case["case"]):
            rows.setdefault(case["case"], []).append(case)
    return [_best([_finding(target, case, record) for case in found]) for found in rows.values()]


def _best(found: list[Finding]) -> Finding:
    return min(found, key=lambda finding: finding.short)


def _finding(target: Target, case: Case, record: Record) -> Finding:
    goal = target.value
    if target.measure == "us" and case["correct"]:
        goal = case["device"]["target_us"] or goal  # none in results from before the goal was set
    if target.measure == "TFLOP/s":
        goal *= record["session"]["bf16_flop_per_second"] / _H200.matrix
    value, why = None, ""
    if not case["correct"]:
        why = "FAILED"
    elif target.device == "cuda" and "against" in target.measure and cudnn.doubtful(record["cudnn"], target.op):
        why = f"cuDNN {cudnn.words(record['cudnn'])} is no baseline"
    else:
        value = _MEASURES[target.measure](target, case, record)
        why = "" if value is not None else "not measured beside it"
    return Finding(case["case"], value, goal, target.at_most, why)


def _us(case: Case, name: str = "fastvdiff") -> float:
    return 1e3 * case["times"][name]["median"]


def _ratio(case: Case, name: str) -> float | None:
    return _us(case, name) / _us(case) if name in case["times"] else None


def _backwards(case: Case, record: Record) -> dict[str, float]:
    """Everybody's training step less their forward, in microseconds; of the same implementation for ours."""
    name = f"{case['case'].removesuffix('training')}forward"
    same = (c for c in record["cases"] if (c["case"], c["impl"], c["correct"]) == (name, case["impl"], True))
    forward = next(same, {"times": {}})
    return {who: _us(case, who) - _us(forward, who) for who in case["times"] if who in forward["times"]}


def _backward_reached(target: Target, case: Case, record: Record) -> float | None:
    ours = _backwards(case, record).get("fastvdiff")
    moved = target.part * case["device"]["bytes_moved"]
    return None if ours is None else 1e6 * moved / record["session"]["copy_bytes_per_second"] / ours


def _backward_against_best(target: Target, case: Case, record: Record) -> float | None:
    took = _backwards(case, record)
    others = [us for who, us in took.items() if who != "fastvdiff" and not who.endswith(CORE)]
    return min(others) / took["fastvdiff"] if others and "fastvdiff" in took else None


def _against_cudnn(target: Target, case: Case, record: Record) -> float | None:
    """In channels_last, whatever the case's own format."""
    return _ratio(case, "eager" if "-channels_last-" in case["case"] else "eager channels_last")


def _memory(target: Target, case: Case, record: Record) -> float | None:
    peaks = [case["extra"].get(f"peak MB {name}") for name in ("fastvdiff", "eager")]
    return None if None in peaks else peaks[0] / peaks[1]


def _workspace(target: Target, case: Case, record: Record) -> float:
    return float(case["device"]["peak_bytes"]["fastvdiff"] - case["device"]["result_bytes"]["fastvdiff"])


_MEASURES: dict[str, Callable[[Target, Case, Record], float | None]] = {
    "us": lambda target, case, record: _us(case),
    "TFLOP/s": lambda target, case, record: case["device"]["flops"] / _us(case) / 1e6,
    "reached": lambda target, case, record: case["device"]["floor_us"] / _us(case),
    "backward reached": _backward_reached,
    "backward against best": _backward_against_best,
    "against eager": lambda target, case, record: _ratio(case, "eager"),
    "against cuDNN": _against_cudnn,
    "against compiled": lambda target, case, record: _ratio(case, _AUTOTUNED),
    "memory": _memory,
    "workspace": _workspace,
}


def _shown(target: Target, value: float) -> str:
    if target.measure == "us":
        return f"{value:.0f} us"
    if target.measure == "TFLOP/s":
        return f"{value:.0f} TFLOP/s"
    if target.measure == "workspace":
        return f"{value:.0f} bytes"
    return f"{value:.0%}" if target.measure.endswith("reached") else f"{value:.2f}x"


def _goal(target: Target) -> str:
    return f"{'at most ' if target.measure == 'memory' else ''}{_shown(target, target.value)}"


def _limit(target: Target) -> str:
    """What nothing can pass on an H200."""
    if target.measure.endswith("reached"):
        return "100%"
    if target.device == "cpu" or target.measure not in ("us", "TFLOP/s"):
        return ""
    work = next(case.work for case in gpu_cases.CASES if target.covers(case.op, case.name))
    if target.measure == "TFLOP/s":
        return _shown(target, _H200.matrix * work.rate / 1e12)
    times = (floor(work, _H200).us, floor(work, _H200, least=True).us)
    return " / ".join(dict.fromkeys(_shown(target, us) for us in times))


def _name(record: Record) -> str:
    return f"{record['device']} {record.get('isa', '')}".strip()


def _values(found: Iterable[Finding]) -> Iterator[float]:
    yield from (finding.value for finding in found if finding.value is not None)


def _measured(target: Target, found: list[Finding]) -> str:
    """The range over its cases."""
    values = list(_values(found))
    ends = dict.fromkeys(_shown(target, end) for end in (min(values), max(values))) if values else ()
    return " to ".join(ends)


def _verdict(target: Target, found: list[Finding]) -> str:
    """Met, or missed, where and by how much; and how many of the goal's cases are still owed."""
    named = [name for name, op in _KNOWN[target.device].items() if target.covers(op, name)]
    owed = len(set(named) - {finding.case for finding in found})
    rest = f"; {owed} of {len(named)} cases owed" if owed else ""
    without = [finding for finding in found if finding.value is None]
    if without:
        return f"{without[0].why} in {len(without)} of {len(found)}: {without[0].case}{rest}"
    missed = [finding for finding in found if finding.short > 0]
    if not missed:
        return f"met{rest}"
    worst = max(missed, key=lambda finding: finding.short)
    by = f"{worst.short:.0f} bytes" if worst.goal == 0 else f"{worst.short:.0%}"
    where = "" if len(found) == 1 else f" in {len(missed)} of {len(found)}, most in {worst.case}"
    return f"missed by {by}{where}{rest}"
