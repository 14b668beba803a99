"""What commands take: roots, steps, tags, and the options that several of them share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from ckptman.format.names import check_tag
from ckptman.storage.base import Storage
from ckptman.storage.opening import open_storage

if TYPE_CHECKING:
    StorageType = click.ParamType[Storage]
    RootTextType = click.ParamType[tuple[str, Storage]]
    StepType = click.ParamType[int | str]
    TextType = click.ParamType[str]
else:  # click has generic types since 8.4 only
    StorageType = RootTextType = StepType = TextType = click.ParamType

ENVIRONMENT = "CKPTMAN_ROOT"

Command = TypeVar("Command", bound=Callable[..., object])


class Decorator(Protocol):
    """Adds a parameter to a command."""

    def __call__(self, command: Command, /) -> Command: ...


class Root(StorageType):
    """A path or URL, opened; ``-`` is what the environment says."""

    name = "root"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Storage:
        text = os.environ.get(ENVIRONMENT, "") if value == "-" else value
        if text == "":
            raise click.UsageError(f"no root: give ROOT (a path or a URL), or set {ENVIRONMENT}", ctx)
        try:
            return open_storage(text)  # type: ignore[arg-type]  # it says so itself if it is neither text nor a storage
        except ValueError as error:
            raise click.UsageError(str(error), ctx) from error


class RootText(RootTextType):
    """A root, and the text by which another process can open it too."""

    name = "root"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Storage]:
        if isinstance(value, tuple):
            return value
        text = os.environ.get(ENVIRONMENT, "") if value == "-" else str(value)
        return text, Root().convert(text, param, ctx)


class Step(StepType):
    """Which checkpoint: a step, or a word that `repository.find` knows."""

    name = "step"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, int):
            return value
        text = str(value)
        return int(text) if text.isdecimal() and text.isascii() and len(text) < 20 else text


class Tag(TextType):
    """A name that can be a tag."""

    name = "tag"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return check_tag(str(value))
        except ValueError as error:
            raise click.UsageError(str(error), ctx) from error


class Amount(click.FloatRange):
    """A finite number in a range. NaN is in none, though click, which asks whether it is outside, lets it pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        amount = float(super().convert(value, param, ctx))
        if not math.isfinite(amount):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return amount


def root_argument(*, required: bool = False) -> Decorator:
    """The argument ROOT, as ``storage``. Where it is not *required*, leaving it out means the environment's."""
    if required:
        return click.argument("storage", metavar="ROOT", type=Root())
    return click.argument("storage", metavar="[ROOT]", type=Root(), default="-")


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
yes_option = click.option("--yes", "-y", "is_sure", is_flag=True, help="Do not ask: do it.")
lock_timeout_option = click.option(
    "--lock-timeout",
    "lock_timeout_s",
    metavar="SECONDS",
    type=Amount(min=0),
    default=5.0,
    show_default=True,
    help="How long to wait for another writer to go away.",
)
