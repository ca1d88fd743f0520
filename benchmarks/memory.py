"""Peak memory of a call on the CPU, from the allocator's own events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that tensors allocated during `call` held at once."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    held = most = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
