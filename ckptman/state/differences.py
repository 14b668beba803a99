"""What is said when a checkpoint and the live state disagree: everything at once, and the likeliest reason."""

from __future__ import annotations

from collections import defaultdict

from ckptman.errors import StateMismatch
from ckptman.warning import warn

SHOWN = 20
"""How many differences a message spells out; ``StateMismatch.differences`` has them all."""


class Differences:
    """
    Collects disagreements while a restore is prepared.

    Some may be tolerated with ``strict=False``: what is there on one side only.
    """

    def __init__(self) -> None:
        self._fatal: list[str] = []
        self._tolerable: list[str] = []
        self._missing: dict[str, list[str]] = defaultdict(list)
        self._unexpected: dict[str, list[str]] = defaultdict(list)
        self._resized = False

    def fatal(self, where: str, *, live: str, checkpoint: str) -> None:
        """The two sides differ at *where*, in a way that no ``strict=False`` can mend."""
        self._fatal.append(f"{where}: expected {live}, found {checkpoint} in the checkpoint")

    def resized(self, where: str, *, live: str, checkpoint: str) -> None:
        """A tensor has another shape, dtype or layout."""
        self._resized = True
        self.fatal(where, live=live, checkpoint=checkpoint)

    def tolerable(self, sentence: str) -> None:
        """Something is there on one side only, or differs harmlessly: an error if strict, else a warning."""
        self._tolerable.append(sentence)

    def missing(self, component: str, name: str) -> None:
        """*name* is expected by the live component, and not in the checkpoint."""
        self._missing[component].append(name)
        self.tolerable(f"{component}: {name} is expected, and not in the checkpoint")

    def unexpected(self, component: str, name: str) -> None:
        """*name* is in the checkpoint, and the live component does not have it."""
        self._unexpected[component].append(name)
        self.tolerable(f"{component}: {name} is in the checkpoint, and not expected")

    @property
    def is_empty(self) -> bool:
        """Whether the two sides agree in everything."""
        return not self._fatal and not self._tolerable

    def settle(self, *, strict: bool) -> None:
        """
        Return if there are none; warn once if what there is may be tolerated.

        Raises:
            StateMismatch: Naming them all.
        """
        if self._fatal or (strict and self._tolerable):
            raise StateMismatch(self._message(strict=strict), differences=self._fatal + self._tolerable)
        if self._tolerable:
            text = _listing(self._tolerable)
            warn(f"restored with strict=False although\n{text}")

    def _message(self, *, strict: bool) -> str:
        everything = self._fatal + self._tolerable
        count = f"{len(everything)} difference{'s' if len(everything) > 1 else ''}"
        parts = [f"the checkpoint and the live state disagree ({count}); nothing was changed", _listing(everything)]
        return "\n".join(parts + [f"hint: {hint}" for hint in self._hints(strict=strict)])

    def _hints(self, *, strict: bool) -> list[str]:
        hints = [
            f"in {component!r} {renaming}: was a wrapper added or removed between saving and now?"
            for component in self._missing
            if (renaming := _renaming(self._missing[component], self._unexpected[component]))
        ]
        if self._resized:
            hints.append("tensors of the same name have another shape or dtype: was the model built with other sizes?")
        if strict and self._tolerable and not self._fatal and not hints:
            hints.append("restore(strict=False) tolerates what is there on one side only; only=(…) restores a part")
        return hints


def _listing(sentences: list[str]) -> str:
    shown = [f"  {sentence}" for sentence in sentences[:SHOWN]]
    if len(sentences) > SHOWN:
        shown.append(f"  … and {len(sentences) - SHOWN} more")
    return "\n".join(shown)


def _renaming(missing: list[str], unexpected: list[str]) -> str | None:
    """How the names of one side become those of the other by a common prefix; None if they do not."""
    if not missing or len(missing) != len(unexpected):
        return None
    for longer, shorter, side in ((unexpected, missing, "checkpoint"), (missing, unexpected, "live state")):
        first = longer[0]
        for prefix in (first[: -len(name)] for name in shorter if first.endswith(name) and first != name):
            if {prefix + name for name in shorter} == set(longer):
                return f"the names of the {side} begin with {prefix!r}, the others do not"
    return None
