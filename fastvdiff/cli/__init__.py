"""The `fastvdiff` command: a file per subcommand, each imported when it runs, so that `--help` is quick."""

from .app import app, main

__all__ = ["app", "main"]
