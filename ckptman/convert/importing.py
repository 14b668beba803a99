"""
Import: a foreign checkpoint becomes one of a root.

1. Everything but the tensors' bytes is read and judged. What is refused is refused here: the root is untouched.
2. Become the writer, and save as any other save: new files, manifest, commit. The bytes go from the foreign files
   through two slots of 16 MiB, each of them digested on the way.
3. Before the commit it is checked that no foreign file was written to meanwhile.

Stopped anywhere, nothing exists of it, and the next writer sweeps what lies there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ckptman.convert import accelerate, capturing, dcp, huggingface, optimizers, safetensors_file, torch_file
from ckptman.convert.files import Files
from ckptman.convert.foreign import Foreign, Part, as_kind, raw
from ckptman.convert.stored import Progress
from ckptman.errors import FormatError, SaveFailed
from ckptman.format.names import check_step
from ckptman.pipeline.borrowing import Borrowed
from ckptman.pipeline.engine import Source
from ckptman.pipeline.saving import Job, write_checkpoint
from ckptman.repository import keep
from ckptman.repository.commit import utc_now
from ckptman.repository.ownership import take
from ckptman.repository.repository import Repository
from ckptman.state.kinds import check_state
from ckptman.storage.base import Storage
from ckptman.storage.opening import open_storage
from ckptman.types import Checkpoint

Reader = Callable[[Path, Files], Foreign]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """
    What an import did.

    Attributes:
        checkpoint: The new checkpoint.
        format: What the source was.
        kinds: Component name → its kind: what live object it can be restored into.
        left_out: What of the source was not imported, one sentence each.
    """

    checkpoint: Checkpoint
    format: str
    kinds: Mapping[str, str]
    left_out: tuple[str, ...]


def import_checkpoint(
    root: str | os.PathLike[str] | Storage,
    source: str | os.PathLike[str],
    *,
    step: int | None = None,
    kinds: Mapping[str, str] | None = None,
    partial: bool = False,
    lock_timeout: float = 60.0,
    storage_options: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Imported:
    """
    Import *source*, a checkpoint of another tool, into *root*.

    Memory is taken for two slots of 16 MiB, the values, and the largest single tensor if that is not row-major in its
    file; never for the checkpoint. No pickle is run: a file that needs more than plain data and tensors is refused.

    *Not* promised: that the source was whole. Foreign formats have no digests; what is checked is that every size and
    range in them agrees. From the import on, every byte is.

    Args:
        root: As for `CheckpointManager`. Created if it does not exist.
        source: A file of ``torch.save`` (a Lightning checkpoint too), a safetensors file or index, or a directory of
            Hugging Face, accelerate or ``torch.distributed.checkpoint``.
        step: The step that it becomes; None: what the source says.
        kinds: Component name → ``module``, ``optimizer``, ``stateful``, ``container``, ``value`` or ``tensor``, where
            the guess would be wrong.
        partial: Import a directory of Hugging Face or accelerate from which something is missing that is written with
            every checkpoint (optimizer, schedule, random streams); ``left_out`` says what.
        lock_timeout: Seconds to wait for another writer to go away.
        storage_options: For the driver of *root*'s URL, as for `CheckpointManager`.
        progress: Called in between with how many bytes are done, and of how many.

    Raises:
        UnsupportedState: It would have to be unpickled; the message names the global. The root is untouched.
        FormatError: It is damaged, incomplete (see *partial*) or unknown. The root is untouched.
        ValueError: The source does not say its step and none is given, the root has that step already, a component
            cannot be called so, or has none of the *kinds*.
        SaveFailed, LockTimeout, Fenced, CommitUnknown: As `CheckpointManager.save`. Nothing was imported.
    """
    storage = open_storage(root, storage_options=storage_options)
    with Files() as files:
        found = _whole(read(Path(source), files), source, partial=partial)
        found = replace(found, parts=optimizers.with_names(_rekinded(found, kinds or {})))
        number = _step(found, step, source)
        check_state(dict.fromkeys(found.parts), rng=False)
        taken = capturing.take(found)
        _refuse_existing(storage, number)
        checkpoint = _save(storage, number, taken, files, lock_timeout, progress)
    return Imported(
        checkpoint=checkpoint,
        format=found.format,
        kinds={name: part.kind for name, part in found.parts.items()},
        left_out=found.left_out,
    )


def read(path: Path, files: Files) -> Foreign:
    """
    What lies at *path*, whatever format it has.

    Raises:
        FormatError: Nothing that is known; or it is damaged or incomplete.
        UnsupportedState: It would have to be unpickled.
    """
    if not path.exists():
        raise FormatError(f"{path} does not exist")
    return _reader(path, files)(path, files)


def _reader(path: Path, files: Files) -> Reader:
    if path.is_dir():
        return _directory_reader(path)
    if path.name.endswith((".safetensors", safetensors_file.INDEX)) or safetensors_file.is_file(path, files):
        return safetensors_file.read
    return torch_file.read


def _directory_reader(path: Path) -> Reader:
    for is_directory_of, reader in _DIRECTORIES:
        if is_directory_of(path):
            return reader
    names = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise FormatError(f"{path} is no checkpoint directory that is known: it holds {names}")


_DIRECTORIES: tuple[tuple[Callable[[Path], bool], Reader], ...] = (
    (dcp.is_directory_of, dcp.read),
    (accelerate.is_directory_of, accelerate.read),
    (huggingface.is_directory_of, huggingface.read),
)


def _whole(found: Foreign, source: object, *, partial: bool) -> Foreign:
    """*found*, if nothing is missing, or that was agreed to. Raises FormatError."""
    if not found.missing:
        return found
    if not partial:
        raise FormatError(
            f"{source} is incomplete: {', '.join(found.missing)} missing. A run cannot go on exactly from what is "
            "there; to import that nevertheless, say --partial (partial=True)"
        )
    return replace(found, left_out=(*found.left_out, *(f"{name}: missing in the source" for name in found.missing)))


def _rekinded(found: Foreign, kinds: Mapping[str, str]) -> dict[str, Part]:
    unknown = sorted(kinds.keys() - found.parts.keys())
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such component; there are {', '.join(found.parts)}")
    return {name: part if name not in kinds else as_kind(raw(part), kinds[name]) for name, part in found.parts.items()}


def _step(found: Foreign, step: int | None, source: object) -> int:
    number = found.step if step is None else step
    if number is None:
        raise ValueError(f"{source} does not say which step it is of: give the number of completed training steps")
    return check_step(number)


def _refuse_existing(storage: Storage, step: int) -> None:
    if any(entry.step == step for entry in Repository(storage).entries()):
        raise ValueError(f"{storage.url} has a step {step} already: delete it first, or import as another step")


def _save(
    storage: Storage,
    step: int,
    taken: capturing.Taken,
    files: Files,
    lock_timeout_s: float,
    progress: Progress | None,
) -> Checkpoint:
    owner = take(storage, timeout_s=lock_timeout_s)
    with ExitStack() as stack:
        stack.callback(owner.release)
        if any(entry.step == step for entry in owner.newest.checkpoints):
            raise SaveFailed(f"{storage.url} got a step {step} meanwhile: nothing was imported", step=step)
        arena = capturing.arena()
        planned = capturing.plan(taken.captured)
        job = Job(
            step=step,
            created_at=utc_now(),
            metrics={},
            tags=(),
            preempted=False,
            keep=keep.everything,
        ).having(taken.captured)
        source = Source(
            [file for file, _ in planned],
            Borrowed(),
            capturing.slots(planned, taken.data, arena, progress),
            arena,
            files.check_unchanged,
        )
        return write_checkpoint(owner, job, source).checkpoint
