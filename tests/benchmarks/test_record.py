"""Results files: partial runs add up, and nothing that was measured elsewhere stays beside them."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.record import RESULTS, Recorder, keep, known, merged
from benchmarks.timing import Spread
from tests.benchmarks.results import SESSION, record, right, wrong


def test_partial_runs_add_up(tmp_path: Path) -> None:
    file = keep(record(right("a"), right("b")), tmp_path)
    assert file == tmp_path / "nvidia-h200" / "0.1.0.json"
    later = right("b", times={"eager": 400.0, "fastvdiff": 80.0})
    assert keep(record(later, right("c"), session={**SESSION, "driver": "590"}), tmp_path) == file
    found = json.loads(file.read_text())
    times = {case["case"]: case["times"]["fastvdiff"]["median"] for case in found["cases"]}
    assert times == {"a": 0.1, "b": 0.08, "c": 0.1}
    assert found["session"]["driver"] == "590"  # the last run's
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing left aside


def test_an_implementation_that_a_case_no_longer_has_goes() -> None:
    old = record(right("a", "triton"), right("a", "cuda"))
    assert [(c["case"], c["impl"]) for c in merged(old, record(wrong("a", "cuda")))["cases"]] == [("a", "cuda")]


def test_other_surroundings_start_anew() -> None:
    old, new = record(right("a")), record(right("b"), torch="2.13.0")
    assert merged(old, new) == new


def test_what_is_known_is_right_and_of_the_same_surroundings(tmp_path: Path) -> None:
    facts = {name: value for name, value in record().items() if name != "cases"}
    assert known(facts, tmp_path) == set()
    keep(record(right("a"), wrong("b")), tmp_path)
    assert known(facts, tmp_path) == {"a"}
    assert known({**facts, "torch": "2.13.0"}, tmp_path) == set()


def test_cases_keep_their_place_and_ops_stay_together() -> None:
    old = record(right("a", op="y"), right("b", op="y"), right("c", op="x"))
    both = merged(old, record(right("d", op="y"), right("a", op="y", impl="cuda")))
    assert [(case["case"], case["impl"]) for case in both["cases"]] == [
        ("a", "cuda"), ("b", "triton"), ("d", "triton"), ("c", "triton"),
    ]  # fmt: skip


def test_a_file_is_json_with_a_line_per_case(tmp_path: Path) -> None:
    whole = record(right("a"), wrong("b"))
    text = keep(whole, tmp_path).read_text()
    assert json.loads(text) == whole
    assert len([line for line in text.splitlines() if '"case"' in line]) == 2
    assert json.loads(keep(record(device="empty"), tmp_path).read_text())["cases"] == []


def test_a_recorder_keeps_only_where_it_is_told_to(tmp_path: Path) -> None:
    assert Recorder(1.0, False).save() is None
    recorder = Recorder(1.0, False, tmp_path)
    recorder.add("group_norm_silu", "small", {"eager": Spread(1, 2, 3), "fastvdiff": Spread(0.5, 1, 1.5)}, 2.0)
    found = json.loads(recorder.save().read_text())
    case = found["cases"][0]
    assert (case["op"], case["impl"], case["correct"], case["target"]) == ("group_norm_silu", "cpu", True, 2.0)
    assert "device" not in case
    assert {"architecture", "isa", "threads", "torch"} <= found.keys()


def test_committed_files_have_what_the_tables_read() -> None:
    for file in RESULTS.rglob("*.json"):
        found = json.loads(file.read_text())
        assert {"architecture", "device", "torch", "fastvdiff", "cases"} <= found.keys(), file
        assert all({"op", "impl", "case", "correct"} <= case.keys() for case in found["cases"]), file
