"""Tables as text."""

from __future__ import annotations

from io import StringIO
from typing import Any


def rendered(table: Any) -> str:
    """A rich renderable as text, wide enough for a log."""
    from rich.console import Console

    text = StringIO()
    Console(file=text, width=132).print(table)
    return text.getvalue().rstrip()
