"""Writing the files of an attempt from staged slots, while another thread computes the digests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

from ckptman.format.digest import BLOCK_NBYTES, Hasher, block_digest
from ckptman.format.manifest import Chunk, File, Tensor
from ckptman.format.names import data_key
from ckptman.pipeline.arena import Arena, Slot
from ckptman.pipeline.cycles import no_search_for_cycles
from ckptman.pipeline.planning import Part, PlannedFile, Run, Segment
from ckptman.storage.base import Distant, Expects, NewFile, Storage

ALONE_NBYTES = 1 << 20
"""So much is copied, digested and written by one thread: to start another one takes longer."""

Result = TypeVar("Result")


def write_files(
    storage: Storage, attempt: str, files: Sequence[PlannedFile], slots: Iterator[Slot], arena: Arena
) -> tuple[list[File], list[Tensor]]:
    """
    Write every file under new names; return how the manifest describes them and their tensors.

    All bytes are durable when this returns; the files' names are not before ``persist``. *slots* are those of the
    segments of *files*, in order; each is given back to *arena* as soon as it is written. In a distant storage a file
    is completed while the next one is written.

    Raises:
        StorageError: The medium failed. What was written is garbage.
        StagingStopped: So did staging.
    """
    described: list[File] = []
    tensors: list[Tensor] = []
    with (
        ThreadPoolExecutor(1, thread_name_prefix="ckptman-digest") as beside,
        _Completing(behind=isinstance(storage, Distant)) as completing,
    ):
        for file in files:
            path = data_key(attempt, file.component)
            digesting = _Digesting(file)
            out = storage.open_new(path)
            try:
                if isinstance(out, Expects):
                    out.expect(file.layout.nbytes)
                for segment in file.segments:
                    slot = next(slots)
                    try:
                        slot.wait()
                        _write_segment(out, segment, slot.view, digesting, beside)
                    finally:
                        arena.give_back(slot)
                completing.commit(out)
            except BaseException:
                out.abort()
                raise
            described.append(file.layout.file(path))
            tensors += digesting.described(len(described) - 1)
    return described, tensors


def _write_segment(
    out: NewFile, segment: Segment, data: memoryview, digesting: _Digesting, beside: ThreadPoolExecutor
) -> None:
    if segment.nbytes <= ALONE_NBYTES:
        digesting.feed(segment, data)
        out.write(data[: segment.nbytes])
        return
    digested = _begin(beside, lambda: digesting.feed(segment, data))
    try:
        out.write(data[: segment.nbytes])
    finally:
        digested()  # after this nobody reads *data* any more


def _begin(executor: ThreadPoolExecutor, work: Callable[[], Result]) -> Callable[[], Result]:
    """Begin *work* on another thread; what is returned waits for it."""
    try:
        return executor.submit(work).result
    except RuntimeError:  # the interpreter waits for this last save before it exits, and starts no thread any more
        done = work()
        return lambda: done


class _Completing:
    """
    Commits files one after the other, with *behind* each while the next one is written.

    When its block is left without an error all are committed; and however it is left, none is being committed any
    more.
    """

    def __init__(self, *, behind: bool) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ckptman-complete") if behind else None
        self._committed: Callable[[], object] = lambda: None

    def commit(self, out: NewFile) -> None:
        """Begin to commit *out*, once the one before it is committed. Nobody else may touch it from then on."""
        self._committed()
        if self._thread is None:
            out.commit()
        else:
            self._committed = _begin(self._thread, out.commit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        if kind is None:
            self._committed()


class _Digesting:
    """The digests of a file's tensors, from its segments in order."""

    def __init__(self, file: PlannedFile) -> None:
        self._tensors = file.layout.tensors
        self._boxes = file.boxes
        self._digests: list[tuple[str, ...]] = []  # of the tensors that are complete
        self._blocks: list[str] = []  # of the one that is not
        self._hasher = Hasher()  # of its block that is not

    def feed(self, segment: Segment, data: memoryview) -> None:
        for piece in segment.pieces:
            if isinstance(piece, Run):
                self._run(piece, data)
            else:
                self._part(piece, data[piece.at : piece.at + piece.stop - piece.start])

    @no_search_for_cycles()
    def described(self, file: int) -> list[Tensor]:
        return [
            Tensor(
                name=box.name,
                dtype=placed.dtype,
                shape=placed.shape if box.shape is None else box.shape,
                chunks=(
                    Chunk(
                        file=file,
                        start=placed.start,
                        nbytes=placed.nbytes,
                        digests=digests,
                        offset=box.offset,
                        shape=None if box.offset is None else placed.shape,
                        key=placed.key if placed.key != box.name.partition("/")[2] else None,
                    ),
                ),
            )
            for placed, box, digests in zip(self._tensors, self._boxes, self._digests, strict=True)
        ]

    def _run(self, run: Run, data: memoryview) -> None:
        at = run.at
        for placed in self._tensors[run.first : run.last]:
            stop = at + placed.nbytes
            if placed.nbytes > BLOCK_NBYTES:
                self._part(Part(0, 0, placed.nbytes, at), data[at:stop])
            else:
                self._digests.append((block_digest(data[at:stop]),) if placed.nbytes else ())
            at = stop

    def _part(self, part: Part, data: memoryview) -> None:
        position = part.start
        while data:
            room = BLOCK_NBYTES - position % BLOCK_NBYTES
            head, data = data[:room], data[room:]
            self._hasher.update(head)
            position += len(head)
            if position % BLOCK_NBYTES == 0:
                self._end_block()
        if position == self._tensors[len(self._digests)].nbytes:
            if position % BLOCK_NBYTES:
                self._end_block()
            self._digests.append(tuple(self._blocks))
            self._blocks = []

    def _end_block(self) -> None:
        self._blocks.append(self._hasher.hexdigest())
        self._hasher = Hasher()
