"""The stages of a GPU run: each on its own, none in another's way, and a status that tells."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.record import ROOT


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_what_a_stage_says_is_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = gpu.Stage("tests", python("import os; print('seen', os.environ['OF_ITS_OWN'])"), "", {"OF_ITS_OWN": "1"})
    outcome = gpu.run(stage, tmp_path / "logs")
    assert (outcome.stage, outcome.what) == ("tests", "passed")
    assert outcome.seconds > 0
    assert capsys.readouterr().out == "seen 1\n"
    assert (tmp_path / "logs" / "tests.log").read_text() == "seen 1\n"


def test_a_missing_tool_is_a_sentence(tmp_path: Path) -> None:
    outcome = gpu.run(gpu.Stage("memcheck", ["no-such-program"], program="no-such-program"), tmp_path)
    assert outcome.what == "skipped: no-such-program is not on the PATH"


def test_a_failing_stage_stops_nobody_and_the_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [
        gpu.Stage("build", python("raise SystemExit(3)")),
        gpu.Stage("memcheck", ["x"], program="no-such-program"),
        gpu.Stage("bench", python("print('ran')")),
    ]
    monkeypatch.setattr(gpu, "stages", lambda *given: made)
    assert gpu.main(["--results", str(tmp_path)]) == 1
    words = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [(line[0], line[3]) for line in words] == [
        ("build", "failed"),
        ("memcheck", "skipped:"),
        ("bench", "passed"),
    ]
    made.pop(0)
    assert gpu.main(["--results", str(tmp_path)]) == 0


def test_stages_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASTVDIFF_NO_ISOLATION", raising=False)
    assert [s.name for s in gpu.stages(gpu.STAGES, tmp_path, "", "not large", False)] == list(gpu.STAGES)
    bench, build, memcheck = gpu.stages(
        ["bench", "build", "memcheck"], tmp_path, "svd-l0 and forward", "not large", True
    )
    assert bench.command[-3:] == ["-k", "svd-l0 and forward", "--missing"]
    assert str(tmp_path) in bench.command
    assert "--no-deps" not in build.command
    assert memcheck.command[:3] == ["compute-sanitizer", "--tool", "memcheck"]
    assert memcheck.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    monkeypatch.setenv("FASTVDIFF_NO_ISOLATION", "1")
    (build,) = gpu.stages(["build"], tmp_path, "", "", False)
    assert {"--no-build-isolation", "--no-deps"} < set(build.command)
    with pytest.raises(SystemExit):
        gpu.main(["everything"])


def gpu_tests() -> dict[str, str]:
    """Name -> source of every test of a file that is marked `gpu` as a whole."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*_gpu.py")):
        text = path.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[f"{path.name}::{node.name}"] = ast.get_source_segment(text, node) or ""
    return found


def test_what_the_sanitizers_cannot_run_says_so_in_its_name() -> None:
    """Graphs need an allocator that they run without, gigabytes take them hours."""
    for name, source in gpu_tests().items():
        assert ("graph" in name) >= ("cuda.graph(" in source), name
        assert ("large" in name) >= ("2**31" in source), name


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("test_group_norm_silu_gpu.py", 'impl="cuda_sm90"'),
        ("test_conv3d_gpu.py", "needs_sm90()"),
        ("test_conv3d_gpu.py", "stats_groups"),
        ("test_conv3d_gpu.py", "norm_silu_conv3d"),
        ("test_conv3d_gpu.py", "prefix=prefix"),
    ],
)
def test_the_sanitizers_see(file: str, what: str) -> None:
    """Kernels that run only where they are named, and what changes a kernel's path."""
    assert gpu._SMALL == "not large and not graph"
    chosen = [name for name, source in gpu_tests().items() if name.startswith(file) and what in source]
    assert [name for name in chosen if "large" not in name and "graph" not in name]


def collected(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_session_measures_one_kind_of_device() -> None:
    cpu = collected("--device", "cpu")
    assert cpu.returncode == 0, cpu.stdout
    assert "test_ops.py" in cpu.stdout
    assert "test_gpu.py" not in cpu.stdout
    asked = collected("--device", "cuda")
    if torch.cuda.is_available():
        assert "test_gpu.py" in asked.stdout
        assert "test_ops.py" not in asked.stdout
    else:
        assert "--device cuda: expected a GPU, torch.cuda.is_available() is False" in asked.stderr
