"""Tables from made-up results: winners, losers, those who declined and those who were wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import gpu_report, report
from benchmarks.record import RESULTS, ROOT, keep
from tests.benchmarks.results import FACTS, network, record, right, wrong

EVERYBODY = {
    "eager": 800.0, "eager channels_last": 700.0, "torch.compile": 500.0, "sdpa-flash": 300.0, "sdpa-flash core": 90.0,
    "sdpa-math": 900.0, "fastvdiff": 100.0,
}  # fmt: skip


def rows(text: str) -> dict[str, dict[str, str]]:
    """The cells of the first table in `text`, by case and column."""
    lines = text[text.index("| case") :].partition("\n\n")[0].splitlines()
    lines = [line.strip().strip("|").split("|") for line in lines]
    head = [cell.strip() for cell in lines[0]]
    return {line[0].strip(): dict(zip(head, (c.strip() for c in line), strict=False)) for line in lines[2:]}


def test_a_headline_row_says_who_is_best() -> None:
    shown = right("svd-l0", times=EVERYBODY, headline=True, target_us=110.0)
    text = gpu_report.headline(record(shown, right("minor")), "benchmarks/results/nvidia-h200/README.md")
    assert "minor" not in text
    assert "4.30 TB/s" in text
    assert "790 TFLOP/s" in text
    cells = rows(text)["svd-l0"]
    assert cells["eager"] == "800.0"
    assert cells["best other"] == "300.0 sdpa-flash"  # not the core, whose inputs nobody has
    assert (cells["fastvdiff"], cells["implementation"]) == ("100.0", "triton")
    assert (cells["rate"], cells["reached"]) == ("2.15 TB/s", "50%")
    assert (cells["against best"], cells["target"]) == ("3.00x", "110.0 met")


def test_a_case_that_loses_is_shown_like_one_that_wins() -> None:
    lost = right("lost", times={"eager": 50.0, "fastvdiff": 100.0}, headline=True, target_us=90.0)
    cells = rows(gpu_report.headline(record(lost), "page"))["lost"]
    assert (cells["against best"], cells["target"]) == ("0.50x", "90.0 missed")


def test_a_wrong_case_shows_no_time() -> None:
    text = gpu_report.headline(record(right("a", headline=True), wrong("bad")), "page")
    assert rows(text)["bad"]["eager"] == "FAILED (triton)"
    assert "- bad (triton): output: relative error" in gpu_report.page(record(wrong("bad")))


def test_a_page_has_everybody_and_why_some_declined() -> None:
    declined = {"sdpa-cudnn": "No available kernel.", "sdpa-cudnn core": "No available kernel."}
    page = gpu_report.page(
        record(
            right("svd-l0", times=EVERYBODY, refused=declined, peak_bytes={"eager": 5_000_000, "fastvdiff": 1_000_000}),
            right("norm", op="group_norm_silu", binds="arithmetic", warm={"eager": {"median": 0.01}}),
        )
    )
    cells = rows(page.partition("## temporal_attention")[2])["svd-l0"]
    assert cells["sdpa-cudnn"] == "declined"
    assert cells["fastvdiff"] == "100.0 (90.0 to 110.0)"
    assert "sdpa-flash core" not in cells
    assert "- **sdpa-cudnn**: No available kernel.: svd-l0" in page
    alone = rows(page.partition("attention kernels alone")[2])["svd-l0"]
    assert (alone["sdpa-flash core"], alone["sdpa-cudnn core"]) == ("90.0", "declined")
    memory = rows(page.partition("## temporal_attention")[2].partition("Peak memory")[2])["svd-l0"]
    assert (memory["eager"], memory["fastvdiff"], memory["torch.compile"]) == ("5", "1", "")
    norm = page.partition("## group_norm_silu")[2].partition("##")[0]
    assert "attention kernels alone" not in norm
    assert rows(norm)["norm"]["rate"] == "10 TFLOP/s"
    assert rows(norm.partition("Warm L2")[2])["norm"]["eager"] == "10.0"


def test_the_session_table_is_a_line_per_row() -> None:
    made = [right("a", times=EVERYBODY, target_us=90.0), right("a", "cuda"), wrong("b")]
    lines = report.text(made, FACTS).splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["a", "triton", "800.0", "300.0", "100.0", "2.15", "TB/s", "50%", "90.0", "missed"]
    assert "FAILED: output" in lines[3]


def test_tables_are_written_between_the_marks(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    keep(record(right("svd-l0", headline=True)), results)
    page = results / "nvidia-h200" / "README.md"
    assert report.write(results, readme) == [readme, tmp_path / "docs" / "targets.md", page]
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "](results/nvidia-h200/README.md)" in text
    assert "## temporal_attention" in page.read_text()


def test_training_steps_and_swapped_networks_have_tables_of_their_own() -> None:
    def case(op: str, **medians: float) -> dict[str, object]:
        times = {name: {"median": median} for name, median in medians.items()}
        extra = {f"peak MB {name}": 10.4 * median for name, median in medians.items()} if op != "conv3d" else {}
        return {"op": op, "case": op, "correct": True, "times": times, "target": None, "extra": extra}

    cpu = {"device": "CPU", "isa": "avx2", "threads": 2, "torch": "2", "cases": [case("conv3d", eager=2, fastvdiff=1)]}
    assert "steps per second" not in report.table(cpu)
    assert "swapped" not in report.table(cpu)
    swapped = case("swap_kernels", **{"eager": 100, "eager channels_last": 80, "fastvdiff": 50})
    cpu["cases"] += [case("training", eager=100, fastvdiff=50, lucidrains=200), swapped]
    assert "\n| swap_kernels | 100 | 80 | 50 | 2.00x | 1040 to 520 MB |\n" in report.table(cpu)
    cpu["cases"].pop()
    ops, _, training = report.table(cpu).partition("| training |")
    assert ops.count("\n| ") == 2  # the head and conv3d
    assert [line.split(" | ")[1:] for line in training.splitlines()[2:]] == [
        ["10.00", "1.00x", "1040 MB |"], ["20.00", "2.00x", "520 MB |"], ["5.00", "0.50x", "2080 MB |"],
    ]  # fmt: skip


def test_the_committed_tables_are_those_of_the_committed_results(tmp_path: Path) -> None:
    """Nobody typed a figure: writing the tables again changes nothing."""
    readme, results = tmp_path / "README.md", tmp_path / "benchmarks" / "results"
    shutil.copy(ROOT / "README.md", readme)
    shutil.copytree(RESULTS, results)
    for file in report.write(results, readme):
        assert file.read_text() == (ROOT / file.relative_to(tmp_path)).read_text(), (
            f"run python -m benchmarks.report: {file}"
        )


def test_results_from_elsewhere_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    keep(record(right("a")), here)
    keep(record(right("b")), elsewhere)
    monkeypatch.setattr(report, "RESULTS", here)
    monkeypatch.setattr(report, "write", lambda: [])
    report.main(["--from", str(elsewhere)])
    found = json.loads((here / "nvidia-h200" / "0.1.0.json").read_text())
    assert [case["case"] for case in found["cases"]] == ["a", "b"]
    with pytest.raises(SystemExit):
        report.main(["--from", str(tmp_path / "nothing")])
    assert "expected results files (*.json)" in capsys.readouterr().err


CONVOLVED = {"eager": 800.0, "eager channels_last": 50.0, "eager contiguous": 900.0, "fastvdiff": 100.0}


@pytest.mark.parametrize(("version", "is_baseline"), [(91002, False), (91400, False), (91500, True), (92000, True)])
def test_an_older_cudnn_is_shown_and_is_no_baseline(version: int, is_baseline: bool) -> None:
    conv = right("level", op="conv3d", times=CONVOLVED, headline=True)
    other = right("norm", op="group_norm_silu", times=CONVOLVED, headline=True)
    found = record(conv, other, cudnn=version)
    text = gpu_report.headline(found, "page")
    cells = rows(text)["level"]
    assert f"cuDNN 9.{version // 100 % 100}.{version % 100}" in text
    assert ("before 9.15" in text) != is_baseline
    assert cells["against best"] == ("0.50x" if is_baseline else "no baseline")
    mark = "" if is_baseline else "†"
    assert (cells["eager"], cells["best other"]) == (f"800.0{mark}", f"50.0{mark} eager channels_last")
    assert cells["fastvdiff"] == "100.0"
    assert rows(text)["norm"]["against best"] == "0.50x"  # it does not convolve
    page = gpu_report.page(found)
    assert ("before 9.15" in page) != is_baseline
    assert rows(page)["level"]["against eager"] == ("8.00x" if is_baseline else "no baseline")
    shown = report.text([conv], {**FACTS, "cudnn": version})
    assert ("before 9.15" in shown) != is_baseline
    assert f" 800.0{mark} " in shown


def test_a_convolutions_workspace_is_its_peak_less_its_result() -> None:
    peaks, results = {"eager": 9_000_000, "fastvdiff": 4_000_000}, {"eager": 4_000_000, "fastvdiff": 4_000_000}
    case = right("level-forward", op="conv3d", peak_bytes=peaks, result_bytes=results)
    cells = rows(gpu_report.page(record(case)).partition("Workspace")[2])["level-forward"]
    assert (cells["eager"], cells["fastvdiff"]) == ("5", "0")
    assert "Workspace" not in gpu_report.page(record(right("svd-l0-forward", peak_bytes=peaks, result_bytes=results)))


def test_whole_networks_have_a_table_beside_the_ops() -> None:
    times = {"eager": 800.0, "torch.compile": 600.0, "fastvdiff": 500.0}
    svd = network("SVD-forward", times, refused={"eager channels_last": "No."})
    found = record(right("a", headline=True), svd, wrong("bad", op="VideoUNet"))
    for text in (gpu_report.headline(found, "page"), gpu_report.page(found)):
        ops, _, whole = text.partition("Whole networks as")
        assert "SVD" not in ops
        cells = rows(whole)["SVD-forward"]
        assert (cells["eager"], cells["eager channels_last"], cells["torch.compile"]) == ("800.0", "declined", "600.0")
        assert (cells["against eager"], cells["target"]) == ("1.60x", "2.0x missed")
        assert cells["peak memory"] == "8000 to 5000"
        assert rows(whole)["bad"]["eager"] == "FAILED (triton)"
    assert "- **eager channels_last**: No.: SVD-forward" in gpu_report.page(found)
    assert "against eager 1.60x" in report.text([svd], FACTS)
    assert (
        rows(gpu_report.page({**found, "cudnn": 91000}).partition("Whole networks as")[2])["SVD-forward"][
            "against eager"
        ]
        == "no baseline"
    )
