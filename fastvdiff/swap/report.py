"""What a swap did: a table, the way back, and a check."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from . import classes
from .tables import rendered
from .verification import Verification, verify


class Entry(NamedTuple):
    """One module: its path, its class, and what was done or why nothing was."""

    path: str
    what: str
    why: str


@dataclass
class SwapReport:
    """What `swap_kernels` replaced and refused.

    `replaced` and `refused` list the modules: path, class name, and what the kernels do there, or why the module was
    left alone. Printing the report shows them as a table, modules of a kind in one row.
    """

    model: nn.Module

    def __post_init__(self) -> None:
        self.replaced: list[Entry] = []
        self.refused: list[Entry] = []
        self._modules: dict[str, nn.Module] = {}

    def add(self, path: str, module: nn.Module, entry: Entry) -> None:
        """Note a module that was swapped."""
        self.replaced.append(entry)
        self._modules[path] = module

    def undo(self) -> None:
        """Give every replaced module its own forward back: the model computes what it did, bit for bit."""
        for module in self._modules.values():
            classes.restore(module)

    def verify(self, *inputs: Any, seconds: float = 0.2, **kwargs: Any) -> Verification:
        """Run the model on `inputs`, and every replaced module both ways, forward and backward.

        Args:
            *inputs: what the model takes.
            seconds: how long each module is timed, both ways in turn; 0 leaves the times out.
            **kwargs: what the model takes by name.

        Returns:
            Module by module: relative errors against float64 beside eager's, times and memory before and after; a
            table when printed. `.passed` says whether every error is within the numerics contract.

        Raises:
            TypeError: the report is that of a scheduler, which is no module: compare what its steps give.
        """
        if not isinstance(self.model, nn.Module):
            raise TypeError(
                "SwapReport.verify: expected the report of a network, by swap_kernels; this one is of "
                f"{type(self.model).__name__}, which is no torch.nn.Module"
            )
        return verify(self.model, self._modules, inputs, kwargs, seconds)

    def __rich__(self) -> Any:
        """The table, for rich."""
        from rich.console import Group
        from rich.table import Table

        done = Table(
            title=f"{len(self.replaced)} modules replaced in {type(self.model).__name__}", title_justify="left"
        )
        left = Table(title=f"{len(self.refused)} left alone", title_justify="left")
        for table, entries, last in ((done, self.replaced, "what runs now"), (left, self.refused, "why")):
            table.add_column("class")
            table.add_column("modules", justify="right")
            table.add_column(last)
            table.add_column("the first of them")
            first: dict[tuple[str, str], str] = {}
            for entry in entries:
                first.setdefault((entry.what, entry.why), entry.path or "(the model)")
            counts = Counter((entry.what, entry.why) for entry in entries)
            for (what, why), count in counts.items():
                table.add_row(what, str(count), why, first[what, why])
        return Group(done, left) if self.refused else done

    def __str__(self) -> str:
        return rendered(self)
