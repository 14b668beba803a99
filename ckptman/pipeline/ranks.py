"""
What all ranks do together: each its part, rank 0 the conclusion; and all get the same answer, or raise the same error.

Everything that ranks must agree upon goes through the one method `Ranks.conclude`. A rank whose part failed says so
instead of giving it, so nobody waits for it: rank 0 passes the failure on. It also warns the others at once, who may be
minutes from the end of theirs: a part that takes long is done within `Ranks.attended`, and is broken off then. Errors
travel as the name of their class, looked up in a closed table, and their text. Nothing is pickled.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from threading import Event, Thread
from typing import Any, TypeVar

import msgspec

from ckptman import errors
from ckptman.coordination.life import LOOK_S
from ckptman.coordinator import Coordinator
from ckptman.errors import CkptmanError, RankLost

_CLASSES: dict[str, type[CkptmanError]] = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, CkptmanError) and not issubclass(kind, SystemExit)
}


BREAK_OFF_S = 5.0
"""How long a rank that is to break off waits for its own storage before it leaves that alone."""

Result = TypeVar("Result")


class BrokenOff(Exception):
    """This rank's part was broken off: another rank's failed."""


class _Failure(msgspec.Struct, frozen=True):
    """An error on its way to other ranks: which rank met it, the class in our tree, the text and the attributes."""

    rank: int
    kind: str
    message: str
    facts: dict[str, Any]


class _Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """A rank's part, or the conclusion: a value or a failure. Broken off is what failed since another's failed."""

    value: bytes = b""
    failure: _Failure | None = None
    is_broken_off: bool = False


class Ranks:
    """
    The ranks of a job, as one of them sees them. To be used by one thread at a time, in the same order on all ranks.

    Attributes:
        rank, world_size: Which rank this is, and of how many.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.rank = coordinator.rank
        self.world_size = coordinator.world_size

    @property
    def are_many(self) -> bool:
        """Whether there are others."""
        return bool(self.world_size > 1)

    @property
    def host(self) -> str:
        """The name of this machine."""
        return str(self._coordinator.host)

    def close(self) -> None:
        """Let the coordinator go."""
        self._coordinator.close()

    def hurry(self) -> None:
        """This rank is about to leave, and others may be dead: find out sooner."""
        self._coordinator.hurry()

    def do(self, part: Callable[[], object]) -> None:
        """Do *part* on every rank; return once all have done it. Raises as ``conclude`` does."""

        def done() -> bytes:
            part()
            return b""

        self.conclude(done)

    def conclude(self, part: Callable[[], bytes], conclusion: Callable[[list[bytes]], bytes] = b"".join) -> bytes:
        """
        Do *part* on every rank, then *conclusion* with all parts, by rank, on rank 0; return what that returned.

        Raises:
            CkptmanError: What was raised by the part of the lowest rank that failed, or by the conclusion: of the same
                class and with the same text on every rank. One of another tree is raised as a plain `CkptmanError`.
            RankLost: A rank went away. Unless this is rank 0, *conclusion* may have been reached all the same.
        """
        if not self.are_many:
            return conclusion([part()])
        mine, error = self._try(part)
        if mine.failure is not None and not mine.is_broken_off:
            self._coordinator.warn()
        parts = self._coordinator.gather(msgspec.msgpack.encode(mine))
        answer: bytes | None = None
        if parts is not None:
            told, failed = self._conclude([msgspec.msgpack.decode(one, type=_Told) for one in parts], conclusion)
            error = error or failed
            answer = msgspec.msgpack.encode(told)
        told = msgspec.msgpack.decode(self._spread(answer), type=_Told)
        if error is not None and not isinstance(error, Exception):
            raise error  # Ctrl-C and the like: who was interrupted is to know it
        if told.failure is not None:
            raise _rebuilt(told.failure) from (error if told.failure.rank == self.rank else None)
        return told.value

    def attended(
        self, work: Callable[[Event], Result], *, left_alone: Callable[[], None], look: Callable[[], None]
    ) -> Result:
        """
        Within the part of `conclude`: do *work*, which may take long, on another thread, and break it off if need be.

        A call of the storage cannot be broken off: an fsync may hang for minutes. Who is to break off waits for it
        `BREAK_OFF_S`, and leaves the thread alone then. That thread decides nothing: what it returns is never looked
        at, and it ends as soon as its call does.

        Args:
            work: Looks now and then whether the event that it gets is set, and raises `BrokenOff` then.
            left_alone: Called if *work* still runs when this raises: what it holds must not be used again.
            look: Called every `LOOK_S` while *work* runs.

        Returns:
            What *work* returned. Nothing of it runs any more then.

        Raises:
            BrokenOff: Another rank's part has failed.
            RankLost: A rank went away. *work* was broken off.
            BaseException: Whatever else *work* raises.
        """
        stop = Event()
        if not self.are_many:
            return work(stop)
        try:
            doing = _beside(work, stop)
        except RuntimeError:  # the interpreter is about to end, and starts no thread any more
            return work(stop)
        try:
            self._attend(doing, look)
        finally:
            stop.set()  # whatever ended it: another rank's failure, a lost rank, Ctrl-C
            if not wait_for([doing], timeout=BREAK_OFF_S).done:
                left_alone()
        if not doing.done():
            raise BrokenOff("another rank failed, and the storage of this one does not answer")
        return doing.result()

    def _attend(self, doing: Future[Result], look: Callable[[], None]) -> None:
        """Return once *work* is done, or is to be broken off."""
        while not wait_for([doing], timeout=LOOK_S).done:
            look()
            if self._coordinator.attend():
                return

    def _spread(self, answer: bytes | None) -> bytes:
        try:
            return self._coordinator.broadcast(answer)
        except RankLost:
            if answer is None:
                raise
            return answer  # rank 0 knows it, whether or not the others will

    def _conclude(
        self, parts: list[_Told], conclusion: Callable[[list[bytes]], bytes]
    ) -> tuple[_Told, BaseException | None]:
        failed = [part for part in parts if part.failure is not None]
        if failed:  # the cause before what was broken off for it
            return min(failed, key=lambda part: part.is_broken_off), None
        return self._try(lambda: conclusion([part.value for part in parts]))

    def _try(self, work: Callable[[], bytes]) -> tuple[_Told, BaseException | None]:
        try:
            return _Told(value=work()), None
        except RankLost:
            raise  # of `attended`: all know it already
        except BrokenOff as error:
            return _Told(failure=self._failure(error), is_broken_off=True), error
        except BaseException as error:  # noqa: BLE001 - a rank's edge: all ranks raise it
            return _Told(failure=self._failure(error)), error

    def _failure(self, error: BaseException) -> _Failure:
        kind = type(error).__name__
        is_ours = isinstance(error, CkptmanError) and kind in _CLASSES
        text = str(error) if is_ours else f"{kind}: {error}"
        facts = {name: _sent(value) for name, value in vars(error).items() if _is_simple(value)} if is_ours else {}
        if isinstance(getattr(error, "errno", None), int):
            facts["errno"] = getattr(error, "errno", None)
        return _Failure(
            rank=self.rank,
            kind=kind if is_ours else CkptmanError.__name__,
            message=f"{_sent(text)} (on rank {self.rank} of {self.world_size}, host {socket.gethostname()})",
            facts=facts,
        )


def _beside(work: Callable[[Event], Result], stop: Event) -> Future[Result]:
    """Begin *work* on a thread that does not keep the interpreter from ending. Raises RuntimeError."""
    doing: Future[Result] = Future()

    def run() -> None:
        try:
            doing.set_result(work(stop))
        except BaseException as error:  # noqa: BLE001 - a thread's edge: whoever waits raises it
            doing.set_exception(error)

    Thread(target=run, name="ckptman-part", daemon=True).start()
    return doing


def _is_simple(value: object) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(part, str) for part in value)
    return value is None or isinstance(value, (str, int, float))


def _sent(value: Any) -> Any:
    """*value* as it can be told: texts may hold what UTF-8 has not, the names of files above all."""
    if isinstance(value, tuple):
        return tuple(_sent(part) for part in value)
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _rebuilt(failure: _Failure) -> CkptmanError:
    error = _CLASSES.get(failure.kind, CkptmanError)(failure.message)
    for name, value in failure.facts.items():
        setattr(error, name, tuple(value) if isinstance(value, list) else value)
    return error
