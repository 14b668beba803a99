"""
Every disk that a power loss could have left.

`RecordingSystem` writes down each call that changes the disk. `crash_states` then cuts the power after each of them
and lets the disk keep any choice of what no fsync had made durable:

- bytes written to a file since its last fsync, direct ones too: all of them, none, the first half, or as many zeros;
- names changed in a directory since its last fsync (of that directory): each one happened or not, independently.

An fsync of a file says nothing about its name, and one of a directory nothing about the bytes of its files. Hard
links are names of one file. That is what POSIX allows; real filesystems keep more, so who survives here survives there.

    system = RecordingSystem(tmp_path)
    storage = LocalStorage(tmp_path / "root", system=system)
    storage.create("key", b"value")
    system.mark("key")                                        # acknowledged: must never be lost
    for state in crash_states(system.journal, seed=0):
        if "key" in state.acknowledged:
            assert state.storage("root").read("key", limit=9) == b"value"

Not modelled: changes in place (ckptman makes none), renames (nor these), a disk that lies about fsync, bit rot.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ckptman.storage.base import is_key
from ckptman.storage.memory import MemoryStorage
from ckptman.testing.journal import Entry, Linked, Made, Marked, RecordingSystem, Removed, Synced, SyncedNames, Wrote

__all__ = ["CrashState", "RecordingSystem", "crash_states"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashState:
    """
    What a power loss left.

    Attributes:
        tree: Path, relative to the base → content, of every file that can be reached.
        acknowledged: The labels that had been marked before, in order.
        length: How many entries of the journal had happened.
    """

    tree: dict[str, bytes]
    acknowledged: tuple[str, ...]
    length: int

    def storage(self, root: str = "") -> MemoryStorage:
        """What a storage in *root* (relative to the base) would find: every file there that a key can name."""
        start = f"{root}/" if root else ""
        files = {path.removeprefix(start): data for path, data in self.tree.items() if path.startswith(start)}
        return MemoryStorage("after a power loss", values={key: data for key, data in files.items() if is_key(key)})


def crash_states(journal: Sequence[Entry], *, seed: int, limit_per_prefix: int = 64) -> Iterator[CrashState]:
    """
    Every distinct state that a power loss could leave, after each entry of *journal* and before the first.

    Where an entry leaves more than *limit_per_prefix* choices, the extremes are taken (all happened, nothing did), then
    all but one and only one, then random ones from *seed*, up to that number. Two states are the same if tree and
    acknowledgements are.
    """
    chooser = random.Random(seed)
    disk = _Disk()
    seen: set[int] = set()
    for length, entry in enumerate([None, *journal]):
        if entry is not None:
            disk.apply(entry)
        for choice in _choices(disk.questions(), chooser, limit_per_prefix):
            tree = disk.after(choice)
            state = CrashState(tree=tree, acknowledged=tuple(disk.acknowledged), length=length)
            fingerprint = hash((frozenset(tree.items()), state.acknowledged))
            if fingerprint not in seen:
                seen.add(fingerprint)
                yield state


def _choices(counts: list[int], chooser: random.Random, limit: int) -> Iterator[tuple[int, ...]]:
    """Answers to questions with *counts* possible answers each. Answer 0 is always "it all happened"."""
    total = 1
    for count in counts:
        total *= count
    if total <= limit:
        yield from itertools.product(*map(range, counts))
        return
    everything = (0,) * len(counts)
    nothing = (1,) * len(counts)
    telling = [everything, nothing]
    for index, count in enumerate(counts):
        telling += [(*everything[:index], answer, *everything[index + 1 :]) for answer in range(1, count)]
        telling.append((*nothing[:index], 0, *nothing[index + 1 :]))
    yield from telling[:limit]
    for _ in range(limit - len(telling)):
        yield tuple(chooser.randrange(count) for count in counts)


@dataclass(slots=True)
class _File:
    durable: bytes = b""
    pending: bytes = b""

    def contents(self) -> list[bytes]:
        """What it may hold: all, only what was fsynced, half of the rest, or the rest as zeros."""
        if not self.pending:
            return [self.durable]
        half = self.pending[: len(self.pending) // 2]
        zeros = bytes(len(self.pending))
        return [self.durable + self.pending, self.durable, self.durable + half, self.durable + zeros]


@dataclass(slots=True)
class _Directory:
    """``durable`` names, and ``pending`` changes of names since the last fsync; None is a removal."""

    durable: dict[str, _File | _Directory] = field(default_factory=dict)
    pending: list[tuple[str, _File | _Directory | None]] = field(default_factory=list)

    def names(self, happened: Sequence[bool] | None = None) -> dict[str, _File | _Directory]:
        """Its names, if of the pending changes those *happened*; all of them by default."""
        names = dict(self.durable)
        for index, (name, node) in enumerate(self.pending):
            if happened is not None and not happened[index]:
                continue
            if node is None:
                names.pop(name, None)
            else:
                names[name] = node
        return names


class _Disk:
    """The files and directories of a journal so far, with what is durable of them."""

    def __init__(self) -> None:
        self.acknowledged: list[str] = []
        self._root = _Directory()
        self._files: dict[int, _File] = {}
        self._directories = [self._root]

    def apply(self, entry: Entry) -> None:  # one case for each kind of entry
        match entry:
            case Made(path, None):
                directory = _Directory()
                self._directories.append(directory)
                self._rename(path, directory)
            case Made(path, node) if node is not None:
                self._files[node] = _File()
                self._rename(path, self._files[node])
            case Wrote(node, data) if node in self._files:
                self._files[node].pending += data
            case Synced(node) if node in self._files:
                file = self._files[node]
                file.durable, file.pending = file.durable + file.pending, b""
            case Linked(source, target):
                self._rename(target, self._find(source))
            case Removed(path):
                self._rename(path, None)
            case SyncedNames(path):
                directory = self._find_directory(path)
                directory.durable, directory.pending = directory.names(), []
                self._forget_the_lost()
            case Marked(label):
                self.acknowledged.append(label)

    def questions(self) -> list[int]:
        """How many answers each open question has: one per unsynced file, one per unsynced change of a name."""
        return [4 for file in self._files.values() if file.pending] + [
            2 for directory in self._directories for _ in directory.pending
        ]

    def after(self, choice: Sequence[int]) -> dict[str, bytes]:
        """The tree that the answers in *choice* leave."""
        answers = iter(choice)
        contents = {
            id(file): file.contents()[next(answers)] if file.pending else file.durable for file in self._files.values()
        }
        names = {
            id(directory): directory.names([next(answers) == 0 for _ in directory.pending])
            for directory in self._directories
        }
        tree: dict[str, bytes] = {}
        todo: list[tuple[str, _Directory]] = [("", self._root)]
        while todo:
            start, directory = todo.pop()
            for name, node in names[id(directory)].items():
                if isinstance(node, _File):
                    tree[start + name] = contents[id(node)]
                else:
                    todo.append((f"{start}{name}/", node))
        return tree

    def _forget_the_lost(self) -> None:
        """Drop what no choice can bring back any more, so that it opens no questions."""
        found: dict[int, _File | _Directory] = {}
        todo: list[_File | _Directory] = [self._root]
        while todo:
            node = todo.pop()
            if id(node) not in found:
                found[id(node)] = node
                if isinstance(node, _Directory):
                    todo += node.durable.values()
                    todo += [changed for _, changed in node.pending if changed is not None]
        self._directories = [directory for directory in self._directories if id(directory) in found]
        self._files = {number: file for number, file in self._files.items() if id(file) in found}

    def _rename(self, path: str, node: _File | _Directory | None) -> None:
        folder, _, name = path.rpartition("/")
        self._find_directory(folder).pending.append((name, node))

    def _find(self, path: str) -> _File | _Directory:
        node: _File | _Directory = self._root
        for name in path.split("/") if path else []:
            assert isinstance(node, _Directory)
            node = node.names()[name]
        return node

    def _find_directory(self, path: str) -> _Directory:
        directory = self._find(path)
        assert isinstance(directory, _Directory)
        return directory
