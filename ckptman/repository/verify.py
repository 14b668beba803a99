"""Reading every byte of a checkpoint again, and naming all that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ckptman.errors import CkptmanError, FormatError, IntegrityError
from ckptman.format.catalog import Entry
from ckptman.format.manifest import File, Manifest
from ckptman.format.safetensors_layout import check_header
from ckptman.repository.reading import CheckedReader, Part, parts_of
from ckptman.repository.repository import Repository

Progress = Callable[[int], object]
"""Called with the number of bytes that were just read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong: in which file, with which tensor (None: a header, a manifest), and what."""

    file: str
    tensor: str | None
    what: str


def verify(repository: Repository, entry: Entry, *, progress: Progress = lambda nbytes: None) -> list[Fault]:
    """
    Read every byte of the checkpoint of *entry*; return all faults, none for an intact one.

    Raises:
        StorageError: The medium failed, which is not the same as damage.
    """
    try:
        manifest = repository.manifest(entry)
    except (IntegrityError, FormatError) as error:
        return [_fault(error, f"{entry.attempt}/manifest.json")]
    reader = CheckedReader(repository.storage, manifest)
    files = zip(manifest.files, parts_of(manifest), strict=True)
    return [fault for file, parts in files for fault in _verify_file(reader, manifest, file, parts, progress)]


def _verify_file(
    reader: CheckedReader, manifest: Manifest, file: File, parts: list[Part], progress: Progress
) -> Iterator[Fault]:
    try:
        header = reader.header(file)
    except IntegrityError as error:
        yield _fault(error, file.path)
        if "bytes instead of" not in str(error):
            return
    else:
        for what in check_header(header, file, [(part.tensor, part.chunk) for part in parts], manifest):
            yield Fault(file=file.path, tensor=None, what=what)
    while parts:
        parts, fault = _read_until_fault(reader, file, parts, progress)
        if fault is not None:
            yield fault


def _read_until_fault(
    reader: CheckedReader, file: File, parts: list[Part], progress: Progress
) -> tuple[list[Part], Fault | None]:
    """Read *parts*; stop at the first fault. What is left to read, and the fault."""
    done = 0
    try:
        for part in reader.chunks(file, parts, lambda tensor, chunk: None):
            done += 1
            progress(part.chunk.nbytes)
    except IntegrityError as error:
        at = next((i for i, part in enumerate(parts) if part.tensor.name == error.tensor and i >= done), done)
        return parts[at + 1 :], _fault(error, file.path)
    return [], None


def _fault(error: CkptmanError, file: str) -> Fault:
    tensor = error.tensor if isinstance(error, IntegrityError) else None
    return Fault(file=file, tensor=tensor, what=str(error))
