"""The face: `CheckpointManager`. It does little itself; each method says whom it asks."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from ckptman.boundary import Boundary
from ckptman.coordinator import Coordinator, Solo, current
from ckptman.errors import Preempted
from ckptman.events import (
    BecameWriter,
    Committed,
    Event,
    Hook,
    Hooks,
    Pruned,
    Restored,
    SaveErred,
    Staged,
)
from ckptman.format.metrics import metrics_to_json
from ckptman.format.names import check_step, check_tag
from ckptman.pipeline.background import PendingSave
from ckptman.pipeline.budget import Limits
from ckptman.pipeline.cycles import no_search_for_cycles
from ckptman.pipeline.engine import Engine, Source
from ckptman.pipeline.mirroring import Mirror, Mirroring
from ckptman.pipeline.ranks import Ranks
from ckptman.pipeline.restoring import Restoring, Wanted
from ckptman.pipeline.saving import Job
from ckptman.pipeline.starting import Begun, Starting
from ckptman.preemption import Preemption, Watch
from ckptman.repository import keep as keep_rules
from ckptman.repository.changes import deleting, tagging, untagging
from ckptman.repository.claim import Claim
from ckptman.repository.commit import Change, utc_now
from ckptman.repository.keep import Keep, Mode
from ckptman.repository.ownership import Ownership
from ckptman.repository.repository import Repository, Which
from ckptman.repository.roots import Roots
from ckptman.schedule import Schedule
from ckptman.state.kinds import check_state
from ckptman.storage.base import Storage
from ckptman.storage.opening import open_storage
from ckptman.types import Checkpoint

_log = logging.getLogger("ckptman")

_TO_SAVE = "give it a state to save"


class CheckpointManager:
    """
    Saves the whole training state to a root, and restores it bit for bit.

    Example:
        >>> import torch
        >>> from ckptman import CheckpointManager
        >>> model = torch.nn.Linear(2, 2)
        >>> with CheckpointManager("memory://docs", {"model": model}) as manager:
        ...     manager.save(1, block=True).step
        1

    Args:
        root: A path (``~`` is expanded), a ``file://`` URL, ``memory://name``, any URL that fsspec has a driver for
            (``s3://bucket/run``), or a storage. It is created by the first save.
        state: Component name → live object: a module, an optimizer, anything with ``state_dict`` and
            ``load_state_dict``, a generator, a tensor or array, a dict or list, or a plain value. None opens the root
            for reading: such a manager takes no lock and never writes.
        save_every: What ``maybe_save`` follows: `Every`, or any ``(step, seconds since the last save) -> bool``.
        keep: What to retain. The default deletes nothing; the newest and tagged checkpoints are always kept.
        overlap: Whether ``save`` may return before everything is staged. What an optimizer of the state owns
            (parameters, moments) is then copied behind the next forward and backward pass, and the optimizer's
            ``step()`` waits for it. A tensor that is changed in place before that step fails the save: its version
            counter tells. *Not* seen are changes that move no counter: through ``.data`` or NumPy, and those of an
            optimizer step that was compiled.
        rng: Whether the global random streams of Python, NumPy and torch are saved and restored too.
        lock_timeout: Seconds to wait for another writer to go away.
        storage_options: Handed to fsspec's driver of a URL such as ``s3://…``: credentials, ``endpoint_url``. Without
            them the driver looks into its own environment variables and files.
        single_writer: Accept an object store whose create-only put does not exclude; you see to it that nobody else
            writes.
        limits: Memory, threads, and saves at a time: see `Limits`.
        coordinator: How the ranks of a job talk to each other. None: ``torch.distributed`` where it is initialised with
            several ranks, else this process is alone.
        hooks: Called with every event.
        preemption: How the job learns that it will be stopped, beside SIGTERM and SIGUSR1, and how long it then has.
        mirror: A second root that gets a copy of every checkpoint in the background: a root, or a `Mirror` with its own
            ``keep``. ``restore`` reads both. What fails there is an event, and never a failed save.

    Use it from one thread. In a job of several ranks every rank opens one, with its part of the state, and all call
    ``save``, ``maybe_save``, ``restore``, ``tag``, ``untag``, ``delete`` and ``close`` in the same order.

    Raises:
        TypeError, ValueError: An argument is wrong. Nothing was read or written.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        state: Mapping[str, object] | None = None,
        *,
        save_every: Schedule | None = None,
        keep: Keep = keep_rules.everything,
        overlap: bool = False,
        rng: bool = True,
        lock_timeout: float = 60.0,
        storage_options: Mapping[str, object] | None = None,
        single_writer: bool = False,
        coordinator: Coordinator | None = None,
        limits: Limits = Limits(),  # noqa: B008 - a frozen value
        hooks: Iterable[Hook] = (),
        preemption: Preemption = Preemption(),  # noqa: B008 - a frozen value
        mirror: str | os.PathLike[str] | Storage | Mirror | None = None,
    ) -> None:
        self._storage = open_storage(root, storage_options=storage_options, single_writer=single_writer)
        self._repository = Repository(self._storage)
        self._state = None if state is None else check_state(state, rng=rng)
        if save_every is not None and not callable(save_every):
            raise TypeError(f"save_every must be Every(…) or callable, got {save_every!r}")
        if not isinstance(keep, Keep):
            raise TypeError(f"keep must be a rule such as keep.last(3), got {keep!r}")
        if not lock_timeout >= 0:
            raise ValueError(f"lock_timeout must be 0 or more seconds, got {lock_timeout!r}")
        if not isinstance(preemption, Preemption):
            raise TypeError(f"preemption must be Preemption(…), got {preemption!r}")
        if self._state is None and mirror is not None:
            raise ValueError("a manager that is opened for reading has no mirror: give it a state")
        self._hooks = Hooks(hooks)
        coordinator = Solo() if self._state is None else current(coordinator)
        self._ranks = Ranks(coordinator)
        self._watch = Watch(preemption)
        self._boundary = Boundary(coordinator.channel("steps"), self._watch)
        self._save_every = save_every
        self._keep = keep
        self._engine = Engine(self._state, limits, overlap=overlap, ranks=self._ranks.world_size)
        self._background = self._engine.background  # knows nothing of us: the registry of owners keeps it
        self._pid = os.getpid()
        weakref.finalize(self, self._watch.signals.uninstall)
        tell = self._hooks.emit_weakly()
        self._mirroring = None if mirror is None else _mirroring(self, self._storage, mirror, tell)
        mirrored = None if self._mirroring is None else Repository(self._mirroring.storage)
        self._roots = Roots(root=self._repository, mirror=mirrored, emit=tell)
        self._claim = Claim(
            self._storage,
            timeout_s=lock_timeout,
            on_succession=self._background.drain,
            on_taken=_welcoming(self._hooks, self._mirroring),
        )
        self._starting = Starting(self._ranks, self._claim, rng=rng)
        self._restoring = Restoring(
            self._ranks, self._roots, self._engine.borrowing, self._hooks.emit, rng=rng, threads=limits.io_threads
        )
        weakref.finalize(self, self._engine.forget)
        self._is_closed = False
        self._engine.prefault()

    @property
    def root(self) -> str:
        """The root; credentials redacted."""
        return self._storage.url

    def __repr__(self) -> str:
        return f"<CheckpointManager {self.root}{' closed' if self._is_closed else ''}>"

    # ------------------------------------------------------------------ saving

    def save(
        self,
        step: int,
        *,
        metrics: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
        block: bool = False,
    ) -> PendingSave:
        """
        Save the state as *step*, the number of completed training steps.

        Returns once the state is staged: training may go on and change it, while a background thread writes. With
        ``block=True`` it returns once the checkpoint is durable and committed. A save that is still under way is
        waited for first (as many may be as `Limits` says). Saving a step that exists replaces it atomically and makes
        it the latest.

        Nothing of the training run is changed by it: no tensor, no optimizer, no random stream.

        Raises:
            UnsupportedState: A value cannot be saved without pickle. Nothing was written.
            LockTimeout: The first save found another writer that is alive.
            Fenced: Another writer took the root over, earlier or while this was written.
            SaveFailed: Nothing was committed; also raised for an earlier save whose failure nobody collected (this
                one is then not begun).
            CommitUnknown: The storage would not say whether the commit landed.
            TypeError, ValueError: An argument is wrong, or the manager is closed or opened for reading.
        """
        if isinstance(tags, str):
            raise TypeError(f"tags must be a list of names, such as [{tags!r}]; got the text {tags!r}")
        return self._save(step, metrics or {}, tuple(tags), block=block, preempted=False)

    def maybe_save(self, step: int, *, metrics: Mapping[str, float] | None = None) -> PendingSave | None:
        """
        Call once per training step: saves when ``save_every`` says so; returns None otherwise.

        When the job is about to be stopped (SIGTERM, SIGUSR1, and what `Preemption` names), this saves, waits for the
        commit, and raises. The first call in the main thread installs handlers for the two signals.

        With several ranks it is collective, every rank calls it with the same step, and all do the same: one rank's
        notice is all ranks' notice. They agree at most twice a second, not in every step; so *save_every* goes by a
        number of seconds that is the same on all ranks and may be half a second old, and it must depend on nothing but
        its two arguments.

        Raises:
            Preempted: A notice arrived, and the checkpoint is committed. It is a ``SystemExit`` with code 75.
            As ``save``: Whatever it raises.
        """
        self._live(_TO_SAVE)
        self._watch.signals.install()
        outlook = self._boundary.look(check_step(step))
        if outlook.notice is not None:
            self._watch.hear(outlook.notice)
            self._save(step, metrics or {}, (), block=True, preempted=True)
            raise Preempted(f"{outlook.notice} arrived; step {step} is saved in {self.root}", step=step)
        if self._save_every is None or not self._save_every(step, outlook.seconds):
            return None
        return self.save(step, metrics=metrics)

    def _save(
        self, step: int, metrics: Mapping[str, float], tags: tuple[str, ...], *, block: bool, preempted: bool
    ) -> PendingSave:
        began, created_at = time.monotonic(), utc_now()
        try:
            state = self._live(_TO_SAVE)
            self._restoring.check_not_half()
            job = Job(
                step=check_step(step),
                created_at=created_at,
                metrics=metrics_to_json(metrics),
                tags=tuple(dict.fromkeys(check_tag(tag) for tag in tags)),
                preempted=preempted,
                keep=self._keep,
            )
        except Exception as error:
            if self._ranks.are_many and not self._is_closed:
                self._engine.admit(block=True)
                self._starting.tell_all(error)
            raise
        self._engine.admit(block=block or self._ranks.are_many)
        failure = self._background.uncollected()
        if failure is not None and preempted:
            _log.error("an earlier save failed, and this process is about to end: saving step %d all the same", step)
            failure = None
        begun = self._starting.begin(job, state, failure)
        self._boundary.saved()
        try:
            return self._run(begun, began, block=block)
        except BaseException as error:
            begun.abandon(error)
            raise

    def _run(self, begun: Begun, began: float, *, block: bool) -> PendingSave:
        step = begun.job.step

        def write(source: Source) -> Checkpoint:
            return self._write(begun, source, began)

        def on_staged(nbytes: int, stall_s: float) -> None:
            self._hooks.emit(Staged(root=self.root, step=step, nbytes=nbytes, stall_s=stall_s))

        if block:
            future: Future[Checkpoint] = Future()
            future.set_result(self._engine.save_now(write, begun.captured, begun.attempts))
            return PendingSave(step, future, time.monotonic() - began)
        return self._engine.save_behind(
            write, begun.captured, begun.attempts, step=step, began=began, on_staged=on_staged
        )

    def _write(self, begun: Begun, source: Source, began: float) -> Checkpoint:
        job = begun.job
        try:
            saved = begun.write(source)
        except BaseException as error:
            self._hooks.emit(SaveErred(root=self.root, step=job.step, error=error))
            raise
        self._engine.borrowing.saved(saved.manifest)
        duration_s = time.monotonic() - began
        _log.info("saved step %d to %s: %d bytes in %.2f s", job.step, self.root, saved.checkpoint.nbytes, duration_s)
        self._watch.took(duration_s)
        self._hooks.emit(Committed(root=self.root, checkpoint=saved.checkpoint, duration_s=duration_s))
        if saved.pruned:
            self._hooks.emit(Pruned(root=self.root, steps=saved.pruned))
        self._notify_mirror()
        return saved.checkpoint

    # ------------------------------------------------------------------ restoring

    def restore(
        self, which: Which = "latest", *, only: Collection[str] | None = None, strict: bool = True
    ) -> Checkpoint | None:
        """
        Load a checkpoint into the live objects, in place. Every byte is checked on the way.

        Args:
            which: ``"latest"``, a step, ``"best:METRIC:min"`` (or ``:max``), or a tag.
            only: Names of the components to restore; the others, and the random streams, stay as they are.
            strict: False leaves out what only one side has, with a warning, instead of raising.

        Returns:
            The checkpoint, with ``values`` (the plain values of the state) and ``skipped``; None if the latest was
            asked for and the root has no checkpoint.

        ``"latest"`` walks back past damaged checkpoints, with a `DamagedCheckpointWarning` for each. With a mirror, it
        is the newest intact one of both roots, read from where it is; others are looked for in the mirror after the
        root. Names, shapes and dtypes are compared before any live object is touched. *Not* promised: after an
        `IntegrityError` (or Ctrl-C) in mid-read the live tensors may be a mixture; the manager then refuses to save
        until a restore succeeds.

        Raises:
            CheckpointNotFound: There is no such step, tag or metric.
            StateMismatch: The checkpoint and the live state disagree. Nothing was touched.
            IntegrityError: The checkpoint is damaged; for ``"latest"``: all of them are.
            FormatError: The checkpoint or the catalog is of a newer format, or no catalog record can be read.
            StorageError: The medium failed; or the root has no checkpoint, and its mirror could not be read.
        """
        state = self._live("give it a state to restore into")
        began = time.monotonic()
        self._background.drain()
        with self._engine.paused():
            checkpoint = self._restoring.restore(state, Wanted(which, only, strict))
        if checkpoint is not None:
            duration_s = time.monotonic() - began
            _log.info("restored step %d from %s in %.2f s", checkpoint.step, checkpoint.url, duration_s)
            self._hooks.emit(Restored(root=self.root, checkpoint=checkpoint, duration_s=duration_s))
        return checkpoint

    # ------------------------------------------------------------------ looking

    def checkpoints(self) -> list[Checkpoint]:
        """What exists, oldest commit first: one listing and one read. Raises StorageError, FormatError."""
        with no_search_for_cycles():
            return [self._repository.checkpoint(entry) for entry in self._roots.entries()]

    def latest(self) -> Checkpoint | None:
        """The most recently committed checkpoint; None if there is none. Loads nothing, checks no data."""
        newest = self._roots.newest()
        return None if newest is None else self._repository.checkpoint(newest)

    def best(self, metric: str, mode: Mode = "min") -> Checkpoint | None:
        """The best checkpoint by *metric*; None if none has a number for it. Of equals the later one."""
        return next(iter(keep_rules.ranked(self.checkpoints(), metric, mode)), None)

    # ------------------------------------------------------------------ changing the catalog

    def tag(self, step: int, name: str) -> None:
        """
        Name the checkpoint *step*. A tag that another checkpoint has moves. A tagged checkpoint is never pruned.

        Raises:
            CheckpointNotFound: There is no such step.
            ValueError: *name* cannot be a tag, or the manager is closed or opened for reading.
            LockTimeout, Fenced, CommitUnknown, StorageError: As ``save``.
        """
        check_tag(name)
        self._change(tagging(step, name, self.root), f"tag step {step} {name!r}")

    def untag(self, step: int, name: str) -> None:
        """Take the tag *name* from the checkpoint *step*. Raises as ``tag`` does."""
        self._change(untagging(step, name, self.root), f"untag step {step} {name!r}")

    def delete(self, step: int) -> None:
        """Drop the checkpoint *step*, tagged or not, and delete its files. Raises as ``tag`` does."""
        self._change(deleting((step,), self.root), f"delete step {step}")

    def _change(self, change: Change, what: str) -> None:
        self._live("give it a state, or use the CLI")
        self._background.drain()
        self._ranks.do(lambda: self._ranks.rank or self._claim.owner().commit(change, what))
        self._notify_mirror()

    # ------------------------------------------------------------------ draining

    def wait(self, timeout: float | None = None) -> None:
        """
        Wait until nothing is under way. A mirror is not waited for.

        Raises:
            TimeoutError: *timeout* seconds were not enough; the save goes on.
            SaveFailed, Fenced, CommitUnknown: A save failed, and nobody has collected the failure yet.
        """
        self._background.drain(timeout)
        self._raise_uncollected()

    def close(self) -> None:
        """
        Wait for what is under way, let go of the root and of the signal handlers. Calling it again does nothing.

        With a mirror, it then waits until the newest checkpoint is there too, as long as `Mirror` says.

        Raises:
            SaveFailed, Fenced, CommitUnknown: As ``wait``, after everything was let go.
            RuntimeError: A hook called this.
        """
        if self._is_closed or os.getpid() != self._pid:
            return
        if self._mirroring is not None:
            self._mirroring.refuse_its_thread()
        self._background.drain()
        self._is_closed = True
        self._watch.signals.uninstall()
        self._engine.close()
        self._claim.release()
        self._ranks.close()
        if self._mirroring is not None:
            self._mirroring.close(waits=not self._watch.has_noticed)
        self._raise_uncollected()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self._ranks.hurry()  # what ended the block may be the death of a rank for which a save still waits
        try:
            self.close()
        except Exception as failure:  # noqa: BLE001 - whatever it is, it must not mask the error of the block
            error.add_note(f"ckptman: and the last save failed: {failure}")

    def _live(self, advice: str) -> Mapping[str, object]:
        """The live state of a manager that is open and has one; others hear *advice*."""
        if self._is_closed:
            raise ValueError(f"this manager of {self.root} is closed")
        if self._state is None:
            raise ValueError(f"this manager of {self.root} was opened for reading: {advice}")
        return self._state

    def _raise_uncollected(self) -> None:
        failure = self._background.uncollected()
        if failure is not None:
            raise failure

    def _notify_mirror(self) -> None:
        if self._mirroring is not None and self._ranks.rank == 0:
            self._mirroring.notify()


def _welcoming(hooks: Hooks, mirroring: Mirroring | None) -> Callable[[Ownership], None]:
    """What happens when this process has become the writer; the mirror may have to catch up."""

    def welcome(owner: Ownership) -> None:
        hooks.emit(BecameWriter(root=owner.storage.url, epoch=owner.writer.epoch))
        if mirroring is not None:
            mirroring.notify()

    return welcome


def _mirroring(
    manager: CheckpointManager,
    source: Storage,
    mirror: str | os.PathLike[str] | Storage | Mirror,
    emit: Callable[[Event], None],
) -> Mirroring:
    """Its thread ends with the manager."""
    mirroring = Mirroring(source, mirror if isinstance(mirror, Mirror) else Mirror(mirror), emit)
    weakref.finalize(manager, mirroring.stop)
    return mirroring
