"""A graph without a GPU: the operations of a loop on a tape, played again on the very tensors of the recording."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Tape(TorchDispatchMode):
    """Keeps every operation with its arguments: numbers as they were, tensors by their memory, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result


class TapeRecording:
    """What `TapeRecorder` makes: no line of the loop's Python runs in a replay."""

    def __init__(self, recorder: TapeRecorder, operations: list[Any], output: torch.Tensor) -> None:
        self.output, self._recorder, self._operations, self.replays = output, recorder, operations, 0

    def replay(self) -> None:
        """Run the tape; other recordings share its memory, so what they gave is lost."""
        for recording in self._recorder.recordings:
            recording.output.fill_(float("nan"))
        # What was recorded is below autocast, which must not choose a second time.
        with torch.autocast("cpu", enabled=False):
            for func, args, kwargs, result in self._operations:
                again = func(*args, **kwargs)
                if func._schema.is_mutable:
                    continue
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        self.replays += 1


class TapeRecorder:
    """Records on the CPU."""

    device_type = "cpu"

    def __init__(self, device: torch.device) -> None:
        self.recordings: list[TapeRecording] = []
        self.turns = 0

    def record(
        self, warm_up: Callable[[], torch.Tensor], work: Callable[[], torch.Tensor], beside: TapeRecording | None
    ) -> TapeRecording:
        """See `fastvdiff.sampling.graph_capture.Recorder`."""
        assert (beside is None) == (not self.recordings)
        warm_up()
        with _Tape() as tape:
            output = work()
        self.recordings.append(TapeRecording(self, tape.operations, output))
        return self.recordings[-1]

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """See `fastvdiff.sampling.graph_capture.Recorder`."""
        self.turns += 1
        yield
