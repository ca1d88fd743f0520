"""How a mistake of the user ends a command: one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer


def refuse(message: object) -> NoReturn:
    """Print `Error: message` in one line and leave with exit code 2."""
    line = " ".join(str(message).split())
    typer.secho(f"Error: {line}", fg=typer.colors.RED, err=True)
    raise typer.Exit(2)


@contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Within the block, exceptions of these kinds are the user's mistakes; all others remain our bugs."""
    try:
        yield
    except kinds as error:
        refuse(error)
