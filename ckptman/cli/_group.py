"""The command ``ckptman`` itself: finds its commands lazily, and ends every run in an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from typing import Any, NoReturn

import click

import ckptman as package
from ckptman.cli._failures import failing, warnings_told

_HOMES = {
    "demo": "demo",
    "ls": "ls",
    "latest": "latest",
    "show": "show",
    "verify": "verify",
    "diff": "diff",
    "log": "log",
    "report": "report",
    "prune": "prune",
    "gc": "gc",
    "repair": "repair",
    "tag": "tags",
    "untag": "tags",
    "delete": "delete",
    "cp": "cp",
    "doctor": "doctor",
    "import": "import_",
    "export": "export",
}
"""Each command, and the module of this package that has it under its own name."""


class LazyGroup(click.Group):
    """Imports a command when it is named (so that ``ls`` need not wait for torch); errors become one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_HOMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        home = _HOMES.get(cmd_name)
        if home is None:
            return None
        name = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name
        command = getattr(import_module(f"ckptman.cli.{home}"), name)
        assert isinstance(command, click.Command)
        return command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run and always exit, *standalone_mode* or not: with 0, or the code of the error, which is told on stderr."""
        words = list(sys.argv[1:] if args is None else args) or ["--help"]
        with failing(as_json="--json" in words), warnings_told():
            code = super().main(words, prog_name or "ckptman", complete_var, standalone_mode=False, **extra)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package.__version__, message="%(prog)s %(version)s")
def ckptman() -> None:
    """
    Look after the checkpoints of a training run.

    ROOT is where they lie: a path or a URL. "-" stands for $CKPTMAN_ROOT, and where ROOT would be the only argument
    it may be left out. STEP is a step, "latest", "best:METRIC:min" (or ":max"), or a tag.

    Exit codes: 0 done, 1 failed, 2 wrong usage or not confirmed, 3 no such checkpoint, 4 damaged or of a newer
    format, 5 another writer has the root, 130 interrupted.
    """
