"""
One save, from what is staged to what is committed.

1. Name the attempt; nobody else ever writes under that name.
2. Write the data files: each is created exclusively and durable when it is closed.
3. Write the manifest likewise, then make the names in the attempt's folder and in the root durable. Where staging was
   left to a thread, wait until it is known that nothing was changed while it was copied (overlap.py).
4. Commit: one catalog record that lists the checkpoint and, in the same breath, drops what ``keep`` does not keep.
5. Delete the files of what was dropped.

Killed before 4, the attempt is garbage that the next writer sweeps. Killed after it, the checkpoint exists, and so
does some garbage. There is no third case.
"""

from __future__ import annotations

import functools
import platform
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
import torch

from ckptman.errors import CommitUnknown, Fenced, SaveFailed, StorageError
from ckptman.format.catalog import Entry, entry_of
from ckptman.format.digest import sha256
from ckptman.format.manifest import Component, File, Manifest, Tensor, write_manifest
from ckptman.format.metrics import JsonMetrics
from ckptman.format.names import Attempt, manifest_key
from ckptman.pipeline.cycles import no_search_for_cycles
from ckptman.pipeline.engine import Source
from ckptman.pipeline.writing import write_files
from ckptman.repository.changes import retained, with_checkpoint
from ckptman.repository.keep import Keep
from ckptman.repository.ownership import Ownership
from ckptman.repository.repository import checkpoint_of
from ckptman.state.capture import Captured
from ckptman.storage.base import Storage
from ckptman.types import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A save. ``captured`` gives kinds, values and aliases; the tensors' bytes come from a `Source`."""

    step: int
    created_at: datetime
    metrics: JsonMetrics
    tags: tuple[str, ...]
    preempted: bool
    keep: Keep
    world_size: int = 1
    captured: Mapping[str, Captured] = field(default_factory=dict)

    def having(self, captured: Mapping[str, Captured]) -> Job:
        """This save, now that the state is *captured*. The tensors are not kept alive."""
        return replace(self, captured={name: replace(part, leaves=()) for name, part in captured.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A committed save: the checkpoint and its manifest, and the steps that the keep rule dropped with it."""

    checkpoint: Checkpoint
    manifest: Manifest
    pruned: tuple[int, ...]


def write_checkpoint(owner: Ownership, job: Job, source: Source) -> Saved:
    """
    Write and commit *job*; the checkpoint is durable when this returns.

    Raises:
        SaveFailed: Nothing was committed; ``__cause__`` says why.
        Fenced: Another writer took the root over; nothing was committed.
        CommitUnknown: The storage would not say whether the commit landed.
    """
    owner.check()
    attempt = name_attempt(owner, job.step)
    try:
        manifest, entry = _write_attempt(owner, job, source, attempt)
        source.confirm()
    except BaseException as error:
        owner.discard(attempt)
        raise _failed(job, error) from error
    try:
        listed, pruned = commit_entry(owner, job, entry)
        return Saved(checkpoint=checkpoint_of(listed, owner.storage.url), manifest=manifest, pruned=pruned)
    except CommitUnknown:
        raise  # it may be listed: whoever reads the catalog next knows
    except (Fenced, SaveFailed, StorageError) as error:
        owner.discard(attempt)
        failure = _failed(job, error)
        if failure is error:
            raise
        raise failure from error


def name_attempt(owner: Ownership, step: int) -> str:
    """A name for the next try at *step*, never used before."""
    return str(Attempt(step=step, epoch=owner.writer.epoch, nonce=secrets.token_hex(4)))


def _failed(job: Job, error: BaseException) -> BaseException:
    if isinstance(error, (Fenced, SaveFailed, KeyboardInterrupt, SystemExit)) or not isinstance(error, Exception):
        return error
    return SaveFailed(f"saving step {job.step} failed, nothing was committed: {error}", step=job.step)


def _write_attempt(owner: Ownership, job: Job, source: Source, attempt: str) -> tuple[Manifest, Entry]:
    after = owner.newest.number
    files, tensors = write_files(owner.storage, attempt, source.files, source.slots, source.arena)
    tensors += source.borrowed.behind(len(files))
    files += source.borrowed.files
    manifest = manifest_of(owner, job, attempt, after=after, files=files, tensors=tensors)
    return manifest, put_manifest(owner.storage, manifest, tags=job.tags)


def manifest_of(
    owner: Ownership, job: Job, attempt: str, *, after: int, files: Sequence[File], tensors: Sequence[Tensor]
) -> Manifest:
    """The manifest of a save by one process, be it for many (an import)."""
    return Manifest(
        root=owner.root,
        step=job.step,
        attempt=attempt,
        after=after,
        created_at=job.created_at,
        world_size=job.world_size,
        metrics=job.metrics,
        preempted=job.preempted,
        components={
            name: Component(kind=part.kind, values=msgspec.Raw(part.values)) for name, part in job.captured.items()
        },
        files=tuple(files),
        tensors=tuple(tensors),
        aliases={alias: name for part in job.captured.values() for alias, name in part.aliases.items()},
        environment=environment(),
    )


def put_manifest(storage: Storage, manifest: Manifest, *, tags: tuple[str, ...]) -> Entry:
    """Write *manifest* and make all names of its attempt durable; return how the catalog will list it."""
    with no_search_for_cycles():
        data = write_manifest(manifest)
    with storage.open_new(manifest_key(manifest.attempt)) as out:
        out.write(data)
    storage.persist([manifest.attempt, ""])
    return entry_of(manifest, sha256(data), tags=tags)


def commit_entry(owner: Ownership, job: Job, entry: Entry) -> tuple[Entry, tuple[int, ...]]:
    """List *entry* and drop what the keep rule drops: how it is listed now, and the steps that were dropped."""
    url = owner.storage.url
    dropped: list[Entry] = []

    def change(entries: tuple[Entry, ...]) -> list[Entry]:
        added = with_checkpoint(entries, entry)
        try:
            left = retained(added, job.keep, url)
        except Exception as error:  # a rule of the user's may raise anything; nothing was put yet
            raise SaveFailed(f"saving step {job.step} failed: the keep rule raised {error!r}", step=job.step) from error
        stays = {e.attempt for e in left}
        dropped[:] = [e for e in added if e.attempt not in stays]
        return left

    record = owner.commit(change, f"save step {job.step}")
    return record.checkpoints[-1], tuple(entry.step for entry in dropped)


@functools.cache
def environment() -> dict[str, str]:
    """What made a checkpoint: versions, the program's name, the git revision. Never arguments or variables."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "ckptman": metadata.version("ckptman"),
        "program": Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "",
        "git": _git_revision(),
    }
    return {name: str(value) for name, value in found.items() if value}


def _git_revision() -> str:
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=2,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: the interpreter is going down
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""
