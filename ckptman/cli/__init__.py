"""
The command line: one file per command, each imported only when it is asked for.

    ls · latest · show · verify · diff · log · report      look, and never create anything
    tag · untag · prune · delete · gc · repair · cp        change a root, as its writer
    import · export                                        other tools' checkpoints, in and out
    doctor                                                 measures a storage
    demo                                                   shows what all this is for

stdout carries data only. Tables are for people; ``--json`` makes it one document for programs.
"""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """
    Run ``ckptman`` with the arguments of this process, then exit with the code that the outcome has.

    Raises:
        SystemExit: Always.
    """
    try:
        _run()
    except KeyboardInterrupt:  # while modules are imported: later ones end in _failures.py, in the same words
        told = '{"error": "Interrupted", "message": "interrupted", "exit_code": 130}'
        sys.stderr.write(f"{told if '--json' in sys.argv else 'error: interrupted'}\n")
        sys.exit(130)


def _run() -> None:
    try:
        import click  # noqa: F401 - an extra: asked for here, so that its lack is told in words
        import rich  # noqa: F401
    except ImportError as error:
        sys.stderr.write(f"error: the command line needs {error.name}: pip install 'ckptman[cli]'\n")
        sys.exit(1)
    from ckptman.cli._group import ckptman

    if sys.stdout is None or sys.stderr is None:  # closed by whoever starts us: what is said is lost, not the work
        nowhere = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot spell is no reason to fail
    ckptman.main()
