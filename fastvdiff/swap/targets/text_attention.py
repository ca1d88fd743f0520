"""Attention to a text that all frames share: its keys and values once, not once a frame.

diffusers' video U-Nets fold frames into the batch and repeat the text for each. The network's own forward says how many
frames there are, for the time of its call; the attentions inside it then take one row of text for all of them, and put
the frames' queries side by side. Without a gradient only: a checkpointed block runs again after that time; and not
under torch.compile.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastvdiff.swap.attention import over_text, ready, unknown
from fastvdiff.swap.target import UNRELATED, Target, register


class _State(threading.local):
    def __init__(self) -> None:
        self.frames = 0


_state = _State()
_repeated = WeakTensorKeyDictionary()  # text -> (its version, frames, whether every frame has the same row)


@contextlib.contextmanager
def _sharing(frames: int) -> Iterator[None]:
    before = _state.frames
    _state.frames = frames
    try:
        yield
    finally:
        _state.frames = before


def _recomputable() -> bool:
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def _check_unet(model: nn.Module) -> str | None:
    return None if any(_check_attention(m) is None for m in _attentions(model)) else UNRELATED


def _attentions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "Attention"]


def _repeating(model: nn.Module, eager: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A U-Net that takes (B, L, C) and repeats it for each frame of sample (B, C, T, H, W) itself."""
    if _recomputable():
        return eager(model, sample, *args, **kwargs)
    with _sharing(sample.shape[2]):
        return eager(model, sample, *args, **kwargs)


def _repeated_before(
    model: nn.Module, eager: Any, sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """A U-Net that is given (B*T, L, C): shared only if all frames have the same rows."""
    frames = sample.shape[2]
    if _recomputable() or not _same_for_all_frames(encoder_hidden_states, frames):
        return eager(model, sample, timestep, encoder_hidden_states, *args, **kwargs)
    with _sharing(frames):
        return eager(model, sample, timestep, encoder_hidden_states, *args, **kwargs)


def _same_for_all_frames(text: torch.Tensor, frames: int) -> bool:
    """Looked at once for each text, as the answer waits for the device."""
    if text.dim() != 3 or text.shape[0] % frames:
        return False
    if text.is_inference():
        # It has no version that would show a change: looked at each time, where that costs no waiting.
        return text.device.type == "cpu" and _same_rows(text, frames)
    known = _repeated.get(text)
    if known is None or known[:2] != (text._version, frames):
        if text.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        known = _repeated[text] = (text._version, frames, _same_rows(text, frames))
    return known[2]


def _same_rows(text: torch.Tensor, frames: int) -> bool:
    rows = text.unflatten(0, (-1, frames))
    return torch.equal(rows, rows[:, :1].expand_as(rows))


def _check_attention(attn: nn.Module) -> str | None:
    if not getattr(attn, "is_cross_attention", False):
        return UNRELATED
    return unknown(attn)


def _attention(
    attn: nn.Module, eager: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None, **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    text = encoder_hidden_states
    understood = text is not None and attention_mask is None and not kwargs and hidden_states.dim() == 3
    if _recomputable() or not understood or text.shape[0] != hidden_states.shape[0] or not ready(attn):
        return eager(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
    if text.shape[1] == 1:
        return over_text(attn, hidden_states, text)
    frames = _state.frames
    if frames < 2 or text.shape[0] % frames:
        return eager(attn, hidden_states, encoder_hidden_states, attention_mask)
    queries = hidden_states.unflatten(0, (-1, frames)).flatten(1, 2)
    return over_text(attn, queries, text[::frames]).unflatten(1, (frames, -1)).flatten(0, 1)


_WHAT = "without a gradient: keys and values of a text once, not once a frame"
register(
    Target(("UNet3DConditionModel", "I2VGenXLUNet"), _WHAT, _check_unet, _repeating, covers=0),
    Target(("UNetMotionModel",), _WHAT, _check_unet, _repeated_before, covers=0),
    Target(("Attention",), _WHAT + "; one key without scores", _check_attention, _attention),
)
