"""A GPU's results as text: the session's table, the README's headline cases, and the device's own page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import cudnn
from benchmarks.record import Record, Row
from benchmarks.sdpa import BACKENDS, CORE

_FIRST = ("eager", "eager channels_last", "eager contiguous", "torch.compile")
_NO_BASELINE = "no baseline"
NETWORKS = ("VideoUNet", "swap_kernels")
_NETWORK_PROVIDERS = (*_FIRST[:2], "torch.compile", "torch.compile max-autotune", "fastvdiff")
Case = dict[str, Any]


def text(rows: Sequence[Row], width: int, cudnn_version: int | None) -> str:
    """The session's table: short, for the results file has the rest."""
    note = cudnn.note({"cudnn": cudnn_version})
    lines = [
        *([note] if note else []),
        f"{'case':{width}}  {'impl':9}{'eager':>9}{'best other':>12}{'ours us':>9}{'rate':>12}{'reached':>9}  target",
    ]
    for row in rows:
        if not row.correct:
            lines.append(f"{row.case:{width}}  {row.impl:9}FAILED: {row.failure}")
            continue
        case = _marked(asdict(row), cudnn_version)
        if case["op"] in NETWORKS:
            lines.append(f"{row.case:{width}}  " + "  ".join(f"{k} {v}" for k, v in _network_cells(case).items() if v))
            continue
        other = _best_other(case)
        lines.append(
            f"{row.case:{width}}  {row.impl:9}{_us(case, 'eager'):>9}{other[1] if other else '':>12}"
            f"{_us(case, 'fastvdiff'):>9}{_rate(case):>12}{_share(case):>9}  {_target(case)}"
        )
    return "\n".join(lines)


def headline(record: Record, page: str) -> str:
    """The cases that stand for the rest, for the README; `page` is where the rest is."""
    columns: dict[str, Callable[[Case], str]] = {
        "case": lambda c: c["case"],
        **{name: lambda c, name=name: _us(c, name) for name in _FIRST},
        "best other": lambda c: " ".join(reversed(_best_other(c) or ())),
        "fastvdiff": lambda c: _us(c, "fastvdiff"),
        "implementation": lambda c: c["impl"],
        "rate": _rate,
        "reached": _share,
        "against best": _against_best,
        "target": _target,
    }
    cases, networks = _cases(record)
    shown = [case for case in cases if not case["correct"] or case["device"]["headline"]]
    lines = [_caption(record) + f" [All cases, who declined, and memory]({page}).", "", *_table(columns, shown)]
    return "\n".join([*lines, *_network_table(networks)])


def page(record: Record) -> str:
    """Everything that was measured on a device."""
    session = record["session"]
    lines = [
        f"# {record['device']}",
        "",
        "Written by `python -m benchmarks.report` from the results file beside it.",
        "",
        _caption(record),
        "",
        f"Cold L2 unless said: {record['flush']}. Calls are replayed from CUDA graphs, providers take turns, and the"
        f" order turns around every round. A graph of one tiny kernel reads {session['empty_us']:.1f} us on this clock."
        f" CUDA {record['cuda']}, cuDNN {cudnn.words(record['cudnn'])}, driver {session['driver'] or 'unknown'}, Triton"
        f" {record['triton']}, Python {record['python']}, fastvdiff {record['fastvdiff']}.",
    ]
    cases, networks = _cases(record)
    for op in dict.fromkeys(case["op"] for case in cases):
        of_op = [{**case, "case": case["case"].removeprefix(f"{op}-")} for case in cases if case["op"] == op]
        lines += ["", f"## {op}", "", *_op_tables(of_op)]
    lines += ["", "## Whole networks", *_network_table(networks)] if networks else []
    return "\n".join([*lines, *_refusals(record["cases"])]) + "\n"


def _caption(record: Record) -> str:
    session = record["session"]
    note = cudnn.note(record)
    return (
        f"{record['device']}, torch {record['torch']}, cuDNN {cudnn.words(record['cudnn'])}, bfloat16; median device"
        ' time in microseconds. "Reached" is the'
        f" share of the device's own measured rates, a copy at {session['copy_bytes_per_second'] / 1e12:.2f} TB/s and a"
        f" matrix product at {session['bf16_flop_per_second'] / 1e12:.0f} TFLOP/s, by the bytes that the kernel"
        " reads and writes; what it finds in the L2 again can bring it past 100 %." + (f" {note}" if note else "")
    )


def _cases(record: Record) -> tuple[list[Case], list[Case]]:
    """The ops' cases and the networks'."""
    marked = [_marked(case, record["cudnn"]) for case in record["cases"]]
    return [c for c in marked if c["op"] not in NETWORKS], [c for c in marked if c["op"] in NETWORKS]


def _network_table(networks: list[Case]) -> list[str]:
    """Times and memory of whole networks, with a line of their own above."""
    if not networks:
        return []
    names = ("case", *_NETWORK_PROVIDERS, "against eager", "target", "peak memory")
    columns = {name: (lambda c, name=name: _network_cells(c)[name]) for name in names[1:]}
    return [
        "",
        "Whole networks as a user launches them, host included: medians in milliseconds, and the most memory that the"
        " activations and gradients of one call held, eager's and fastvdiff's, in MB.",
        "",
        *_table({"case": lambda c: c["case"], **columns}, networks),
    ]


def _network_cells(case: Case) -> dict[str, str]:
    times, refused, goal = case["times"], case.get("refused", {}), case["target"]
    mark = cudnn.MARK if case["doubtful"] else ""
    cells = {
        name: f"{times[name]['median']:.1f}{mark if name != 'fastvdiff' else ''}" if name in times else ""
        for name in _NETWORK_PROVIDERS
    }
    cells |= {name: "declined" for name in refused if name in cells}
    ratio = times["eager"]["median"] / times["fastvdiff"]["median"] if "eager" in times else None
    compared = ratio is not None and not case["doubtful"]
    cells["against eager"] = f"{ratio:.2f}x" if compared else _NO_BASELINE
    verdict = ("met" if ratio >= goal else "missed") if compared and goal else ""
    cells["target"] = f"{goal:.1f}x {verdict}".strip() if goal else ""
    peaks = [case["extra"].get(f"peak MB {name}") for name in ("eager", "fastvdiff")]
    cells["peak memory"] = " to ".join("declined" if peak is None else f"{peak:.0f}" for peak in peaks)
    return cells


def _marked(case: Case, version: int | None) -> Case:
    """The case, and whether what it says about others is from a cuDNN that is no baseline."""
    return {**case, "doubtful": cudnn.doubtful(version, case["op"])}


def _op_tables(cases: list[Case]) -> list[str]:
    """Times; attention's backends on inputs made ready; warm times; memory."""
    ours: dict[str, Callable[[Case], str]] = {
        "fastvdiff": lambda c: _quartiles(c, "fastvdiff"),
        "implementation": lambda c: c["impl"],
    }
    providers = _present(cases, lambda name: not name.endswith(CORE))
    lines = _table(
        {
            "case": lambda c: c["case"],
            **{name: lambda c, name=name: _us(c, name) for name in providers},
            **ours, "rate": _rate, "reached": _share, "against eager": _against_eager, "against best": _against_best,
            "target": _target,
        },
        cases,
    )  # fmt: skip
    core = [name + CORE for name in BACKENDS]
    right = [case for case in cases if case["correct"]]
    if any(name in _everybody(case) for case in right for name in core):
        lines += [
            "",
            "torch's attention kernels alone, on inputs that were permuted and turned beforehand:",
            "",
        ]
        lines += _table(
            {"case": lambda c: c["case"], **{n: lambda c, n=n: _us(c, n) for n in core}, **ours}, right
        )  # fmt: skip
    warm = [case for case in right if case["device"]["warm"]]
    if warm:
        lines += ["", "Warm L2, calls that follow each other in one graph:", ""]
        names = _present(warm, lambda name: not name.endswith(CORE), "warm")
        lines += _table(
            {
                "case": lambda c: c["case"],
                **{n: lambda c, n=n: _of(c["device"]["warm"], n) for n in (*names, "fastvdiff")},
                "implementation": lambda c: c["impl"],
            },
            warm,
        )
    lines += ["", "Peak memory of a call above its inputs, in MB:", ""]
    lines += _table(
        {
            "case": lambda c: c["case"],
            **{n: lambda c, n=n: _megabytes(c, n) for n in (*providers, "fastvdiff")},
            "implementation": lambda c: c["impl"],
        },
        right,
    )
    whole = [case for case in right if case["op"].endswith("conv3d") and case["case"].endswith("forward")]
    if whole:
        lines += ["", "Workspace: what of that is not the result, in MB:", ""]
        lines += _table(
            {
                "case": lambda c: c["case"],
                **{n: lambda c, n=n: _megabytes(c, n, "result_bytes") for n in (*providers, "fastvdiff")},
                "implementation": lambda c: c["impl"],
            },
            whole,
        )
    return lines


def _table(columns: dict[str, Callable[[Case], str]], cases: Iterable[Case]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for case in cases:
        if case["correct"]:
            lines.append("| " + " | ".join(show(case) for show in columns.values()) + " |")
        else:
            lines.append(f"| {case['case']} | FAILED ({case['impl']}) |" + " |" * (len(columns) - 2))
    return lines


def _refusals(cases: list[Case]) -> list[str]:
    """Every sentence with which somebody declined, and for which cases."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, sentence in (_refused(case) if case["correct"] else {}).items():
            found.setdefault((name, sentence), []).append(case["case"])
    lines = ["", "## Who declined", ""] if found else []
    for (name, sentence), names in sorted(found.items()):
        shown = ", ".join(dict.fromkeys(names))
        lines.append(f"- **{name}**: {sentence}: {shown}")
    wrong = [case for case in cases if not case["correct"]]
    if wrong:
        lines += ["", "## Not right", "", *(f"- {c['case']} ({c['impl']}): {c['failure']}" for c in wrong)]
    return lines


def _refused(case: Case) -> dict[str, str]:
    return case.get("refused", {}) if case["op"] in NETWORKS else case["device"]["refused"]


def _everybody(case: Case) -> dict[str, Any]:
    """Those who ran a case and those who declined."""
    return {**case["times"], **case["device"]["refused"]}


def _present(cases: list[Case], wanted: Callable[[str], bool], which: str = "times") -> list[str]:
    """The other providers of these cases, in the order in which they are always shown."""
    names = {
        name
        for case in cases
        if case["correct"]
        for name in (_everybody(case) if which == "times" else case["device"][which])
        if wanted(name) and not name.startswith("fastvdiff")
    }
    known = [*_FIRST, *(n + end for n in BACKENDS for end in ("", CORE))]
    return [name for name in known if name in names]


def _median(case: Case, name: str) -> float:
    return 1e3 * case["times"][name]["median"]


def _of(times: dict[str, Any], name: str) -> str:
    return f"{1e3 * times[name]['median']:.1f}" if name in times else ""


def _us(case: Case, name: str) -> str:
    if name in case["device"]["refused"]:
        return "declined"
    marked = case["doubtful"] and name in case["times"] and name != "fastvdiff"
    return _of(case["times"], name) + (cudnn.MARK if marked else "")


def _quartiles(case: Case, name: str) -> str:
    low, median, high = (1e3 * case["times"][name][q] for q in ("low", "median", "high"))
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def _best_other(case: Case) -> tuple[str, str] | None:
    """The fastest way to the same result that is not ours, from the caller's own tensors: its name and time."""
    others = [n for n in case["times"] if n != "fastvdiff" and not n.endswith(CORE)]
    best = min(others, key=lambda n: case["times"][n]["median"], default=None)
    return None if best is None else (best, _us(case, best))


def _against(case: Case, name: str) -> str:
    if case["doubtful"]:
        return _NO_BASELINE
    return f"{_median(case, name) / _median(case, 'fastvdiff'):.2f}x"


def _against_eager(case: Case) -> str:
    return _against(case, "eager") if "eager" in case["times"] else ""


def _against_best(case: Case) -> str:
    other = _best_other(case)
    return _against(case, other[0]) if other else ""


def _rate(case: Case) -> str:
    """Bytes or operations per second, whichever binds."""
    seconds = _median(case, "fastvdiff") / 1e6
    if case["device"]["binds"] == "memory":
        return f"{case['device']['bytes_moved'] / seconds / 1e12:.2f} TB/s"
    return f"{case['device']['flops'] / seconds / 1e12:.0f} TFLOP/s"


def _share(case: Case) -> str:
    return f"{case['device']['floor_us'] / _median(case, 'fastvdiff'):.0%}"


def _target(case: Case) -> str:
    goal = case["device"]["target_us"]
    if goal is None:
        return ""
    return f"{goal:.1f} {'met' if _median(case, 'fastvdiff') <= goal else 'missed'}"


def _megabytes(case: Case, name: str, less: str = "") -> str:
    """A provider's peak, less what `less` names of it."""
    peaks = case["device"]["peak_bytes"]
    return f"{(peaks[name] - (case['device'][less][name] if less else 0)) / 1e6:.0f}" if name in peaks else ""
