"""The process's random states as tensors and plain values.

Training itself draws from (seed, step) and needs none of them. They are for what a user adds: a callback or a module
that draws from torch's, NumPy's or Python's own generator goes on where it was.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def capture() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The states of torch (CPU and every CUDA device in use), NumPy's global generator and Python's `random`."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    _, words, python_gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"cuda/{device}": state for device, state in enumerate(torch.cuda.get_rng_state_all())}
    values = {
        "numpy": {"position": int(position), "has_gauss": int(has_gauss), "gauss": float(gauss)},
        "python": {"gauss": python_gauss},
    }
    return tensors, values


def restore(tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Take over what `capture` gave; the state of a CUDA device that is not here is left out.

    Raises KeyError or ValueError for anything else.
    """
    torch.set_rng_state(tensors["torch"])
    numpy = values["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    random.setstate((random.Random.VERSION, tuple(tensors["python"].tolist()), values["python"]["gauss"]))
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device in range(devices):
        if f"cuda/{device}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda/{device}"], device)
