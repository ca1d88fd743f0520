"""Reading a saved model: from a folder or the Hugging Face hub, with an error of its own for each way to be broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

Model = TypeVar("Model", bound=nn.Module)


def load(
    model_class: Callable[[Any], Model],
    read_config: Callable[[dict[str, Any]], Any],
    name: str,
    map_location: str | torch.device = "cpu",
    **hub: Any,
) -> Model:
    """`model_class(read_config(config.json))` with the weights beside it, in float32 and eval mode.

    Args:
        model_class: what to build.
        read_config: makes its configuration of a dict.
        name: a folder, or a hub name.
        map_location: device that the weights are read to.
        hub: options of `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: the folder, its config.json or its model.safetensors is not there.
        ValueError: a file is broken, or the two do not fit.
    """
    caller = f"{model_class.__name__}.from_pretrained"
    folder = _folder(caller, name, **hub)
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{caller}: no {file} in {folder}")
    try:
        values = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{caller}: {folder / _CONFIG} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{caller}: {folder / _CONFIG}: expected a JSON object, got {values!r}")
    model = model_class(read_config(values))
    try:
        weights = load_file(folder / _WEIGHTS, device=str(map_location))
    except SafetensorError as error:
        raise ValueError(f"{caller}: {folder / _WEIGHTS} is truncated or no safetensors file: {error}") from error
    _check_fit(caller, model, weights, folder)
    model.load_state_dict(weights)
    return model.to(map_location).eval()


def _folder(caller: str, name: str, **hub: Any) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{caller}: no folder {name}, and a hub name has the form 'user/model'")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=[_CONFIG, _WEIGHTS], **hub))


def _check_fit(caller: str, model: nn.Module, weights: dict[str, Any], folder: Path) -> None:
    """Refuse weights that are not exactly the model's, naming the first few."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    got = {key: tuple(value.shape) for key, value in weights.items()}
    wrong = [f"{key}: expected {expected[key]}, got {got.get(key, 'nothing')}" for key in expected
             if got.get(key) != expected[key]]  # fmt: skip
    wrong += [f"{key}: not a weight of this model" for key in got if key not in expected]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ValueError(f"{caller}: {folder / _WEIGHTS} does not fit {_CONFIG}: {shown}")
