"""Tables on a terminal, and wherever else the output goes."""

from __future__ import annotations

from rich.console import Console


def table_console() -> Console:
    """A console as wide as the terminal; 132 columns where there is none, so that a log's tables stay whole."""
    console = Console()
    return console if console.is_terminal else Console(width=132)
