"""save_pretrained and from_pretrained: offline, exact, and an error of its own for each broken file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvdiff.models import VideoUNet


@pytest.fixture
def folder(tmp_path: Path, small: Callable[..., VideoUNet], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small(temporal_position="relative").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_round_trip(tmp_path: Path, small: Callable[..., VideoUNet], call: Callable[..., dict[str, Any]]) -> None:
    model, arguments = small(dropout=0.1).eval(), call()
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    again = VideoUNet.from_pretrained(tmp_path)
    assert again.config == model.config
    assert isinstance(again.config.channel_multipliers, tuple)
    assert not again.training
    assert torch.equal(again(**arguments), model(**arguments))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_half_precision_files_load_as_float32(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: v.half() for k, v in weights.items()}, folder / "model.safetensors")
    model = VideoUNet.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"VideoUNet.from_pretrained: no {file} in"):
        VideoUNet.from_pretrained(folder)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nowhere", "a/b/c"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no folder {name}, and a hub name has the form 'user/model'"):
        VideoUNet.from_pretrained(name)


@pytest.mark.parametrize("length", [0, 4, 100, 2000, -1])
def test_truncated_weights(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetensors file"):
        VideoUNet.from_pretrained(folder)


def test_weights_of_another_model(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"] = torch.zeros(3)
    del weights["conv_out.bias"]
    weights["more"] = torch.zeros(1)
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"does not fit config\.json: ") as error:
        VideoUNet.from_pretrained(folder)
    assert "conv_in.bias: expected (8,), got (3,)" in str(error.value)
    assert "conv_out.bias: expected (3,), got nothing" in str(error.value)
    assert "more: not a weight of this model" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"width": 3}', "unknown key 'width'"),
        ('{"conv": "4d"}', "conv: expected one of"),
    ],
    ids=["json", "list", "key", "value"],
)
def test_broken_config(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        VideoUNet.from_pretrained(folder)


def test_config_json_is_flat(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    assert values["channel_multipliers"] == [1, 2]
    assert values["temporal_position"] == "relative"
