"""The words of the command line: usage, errors, sizes and ages, and its reference page."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
from cli_roots import Run

from ckptman.cli._documents import number_json
from ckptman.cli._group import ckptman
from ckptman.cli._render import age, printable, size, steps_text
from ckptman.cli._values import pretty, readable
from ckptman.format.values import to_json

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "cli.md"


def commands() -> dict[str, click.Command]:
    top = click.Context(ckptman)
    found = {name: ckptman.get_command(top, name) for name in ckptman.list_commands(top)}
    return {name: command for name, command in found.items() if command is not None}


def test_the_reference_page_has_every_command_and_option() -> None:
    """Each command has a section; each of its options and arguments is named in that section, and no other."""
    sections = dict(re.findall(r"^## `ckptman (\S+)[^\n]*\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S))
    tree = commands()
    assert len(tree) == 18
    assert sections.keys() == tree.keys()
    mentioned = 0
    for name, command in tree.items():
        options = {option for one in command.params if isinstance(one, click.Option) for option in one.opts}
        assert {option for option in options if option.startswith("--")} == set(
            re.findall(r"(?<![\w-])--[a-z][a-z-]*", sections[name])
        ), name
        mentioned += len(options)
    assert mentioned >= 38


def test_every_command_explains_itself(run: Run) -> None:
    """``--help`` of each exits 0 with a first sentence; the bare command shows the same help as ``--help``."""
    assert run().out == run("--help").out
    for name in commands():
        ran = run(name, "--help")
        assert ran.code == 0
        assert ran.out.startswith(f"Usage: ckptman {name} ")
        assert name in run("--help").out


@pytest.mark.parametrize(
    "words", [("nonsense",), ("ls", "--nope"), ("tag", "root"), ("ls", "a", "b"), ("ls", "weird://x"), ("ls", "a\0b")]
)
def test_wrong_usage_is_2(run: Run, words: tuple[str, ...]) -> None:
    """One line on stderr, without a traceback; one object with --json."""
    ran = run(*words)
    assert ran.code == 2
    assert re.fullmatch(r"error: .+ \(see 'ckptman.* --help'\)\n", ran.err)
    assert run(*words, "--json").failure["error"] == "UsageError"


def test_secrets_are_not_repeated(run: Run) -> None:
    """A URL's credentials appear in no message."""
    assert "secret" not in run("ls", "weird://user:secret@host/x").err


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (2**50 * 5000, "5000.0 PiB")],
)
def test_sizes(nbytes: int, text: str) -> None:
    """Bytes as they are, larger ones with one decimal."""
    assert size(nbytes) == text
    assert size(2**20 - 1) == "1.0 MiB"


def test_ages() -> None:
    """The largest unit that fits; a clock that is behind says now."""
    now = datetime(2024, 1, 1, tzinfo=UTC)
    ages = {-5: "now", 0: "now", 59: "59 s ago", 60: "1 min ago", 7200: "2 h ago", 86400 * 3: "3 d ago"}
    assert {s: age(now - timedelta(seconds=s), now=now) for s in ages} == ages


def test_small_texts() -> None:
    """Control characters are spelled out, long lists shortened, numbers that JSON lacks are named."""
    assert printable("a\x1b[31mb\nc") == "a\\x1b[31mb\nc"
    assert steps_text(range(20)) == "0, 1, 2, 3, 4, 5, …, 17, 18, 19"
    assert steps_text(range(3)) == "0, 1, 2"
    assert [number_json(x) for x in (1.5, math.nan, math.inf, -math.inf, None)] == [1.5, "nan", "inf", "-inf", None]


def test_values_are_readable() -> None:
    """Decoded, shortened, and flat where a list holds scalars only."""
    value = {"t": (1, 2.5), "s": "[1, 2]", "b": b"abc", "i": {1: [True, None]}, "n": math.inf, "d": {}}
    assert pretty(readable(to_json({"state": value}, ""))) == (
        '{\n  "t": [1, 2.5],\n  "s": "[1, 2]",\n  "b": "<3 bytes>",\n'
        '  "i": {\n    "1": [true, null]\n  },\n  "n": "inf",\n  "d": {}\n}'
    )
    assert readable(to_json(list(range(100)), "")) == [*range(6), "… 94 more"]
    assert len(readable(to_json({str(i): i for i in range(50)}, ""))) == 21
    assert readable(to_json({"x": 2**100}, "")) == {"x": str(2**100)}
