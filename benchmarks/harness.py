"""The harness: contestants in random order, a process for each measurement, what failed or is missing by name."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.figures import Fields, Target
from benchmarks.scale import Scale

TIMEOUT_S = 900.0
SHARED = "shared"
BEFORE = -1
"""The repetition in which contestants prepare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """
    Where and how big one measurement is.

    Attributes:
        folder: Empty, or as the contestant's ``prepare`` has left it.
        shared: As the question's ``shares`` has left it.
    """

    folder: Path
    scale: Scale
    repetition: int
    shared: Path

    @property
    def pause_s(self) -> float:
        return self.scale.pause_s


Measure = Callable[[Place], Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """
    One who is measured.

    Attributes:
        run: Measures itself, in a process of its own, and returns field → figure.
        module: What must be importable; otherwise it is skipped by name.
        prepare: Runs once before all repetitions, in a process of its own too; its folder is kept for each ``run``.
        is_dispensable: Whether a quick run goes without it.
    """

    run: Measure
    module: str = "torch"
    prepare: Callable[[Place], None] | None = None
    is_dispensable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """
    A field that is shown: seconds, or bytes if its name ends in ``nbytes``.

    Attributes:
        floors: The contestants that know its floor, in ``floor_field`` (the field itself if empty).
        is_plotted: Whether it is a panel of the question's plot, besides a column of its table.
    """

    field: str
    title: str
    floors: tuple[str, ...] = ()
    floor_field: str = ""
    is_plotted: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """
    One question: who is asked, what is shown, what the answer shall be.

    Attributes:
        name: Of its module, its entry in the JSON and its plot.
        asks: The question, for people.
        note: What a reader of the table must know.
        repetitions: At most so many; None: as the scale says.
        shares: Runs once before all contestants, in a process of its own, and leaves what all of them read.
        beside: Runs as long as the question is asked (a server), given the folder that the contestants' are in.
    """

    name: str
    asks: str
    contestants: Mapping[str, Contestant]
    columns: tuple[Column, ...]
    targets: tuple[Target, ...]
    note: str = ""
    repetitions: int | None = None
    shares: Callable[[Place], None] | None = None
    beside: Callable[[Path], AbstractContextManager[object]] = nullcontext


@dataclass(slots=True, kw_only=True)
class Answer:
    """What was measured: a mapping contestant → fields for each repetition, and who is missing and why."""

    repetitions: list[dict[str, Fields]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class MeasurementFailed(Exception):
    """A contestant raised, died or took too long. The message says which."""


Progress = Callable[[Answer, str], object]
"""Is given what is known so far, and what was done last, for people, whenever a process has ended."""


def ask(
    question: Question,
    scale: Scale,
    *,
    folder: Path,
    repetitions: int | None = None,
    seed: int = 0,
    progress: Progress = lambda answer, done: None,
) -> Answer:
    """
    Measure all contestants of *question*, each as often as asked. One that fails is out from then on, by name.

    Raises:
        MeasurementFailed: Not even what all of them share could be made.
    """
    answer = Answer()
    with question.beside(folder):
        _ask(_Round(question, scale, answer, folder, progress), repetitions=repetitions, seed=seed)
    shutil.rmtree(folder, ignore_errors=True)
    return answer


@dataclass(frozen=True, slots=True)
class _Round:
    """What the parts of asking one question have in common."""

    question: Question
    scale: Scale
    answer: Answer
    folder: Path
    progress: Progress

    def place(self, contestant: str, repetition: int) -> Place:
        safe = "".join(c if c.isalnum() else "-" for c in contestant)
        return Place(folder=self.folder / safe, scale=self.scale, repetition=repetition, shared=self.folder / SHARED)


def _ask(asked: _Round, *, repetitions: int | None, seed: int) -> None:
    question = asked.question
    runners = _present(question, asked.scale, asked.answer)
    count = min(repetitions or asked.scale.repetitions, question.repetitions or 1_000)
    if question.shares is not None:
        (asked.folder / SHARED).mkdir(parents=True)
        _in_a_process(question.name, SHARED, asked.place(SHARED, BEFORE))
        asked.progress(asked.answer, "prepared what all share")
    for name in list(runners):
        if question.contestants[name].prepare is not None:
            measured = _try(asked, name, BEFORE, runners)
            asked.progress(asked.answer, f"before all: {_outcome(asked.answer, name, measured)}")
    for number in range(count):
        order = list(runners)
        random.Random(f"{seed} {question.name} {number}").shuffle(order)
        asked.answer.repetitions.append(samples := {})
        for name in order:
            is_kept = question.contestants[name].prepare is not None
            if (measured := _try(asked, name, number, runners)) is not None:
                samples[name] = measured
            if not is_kept:
                shutil.rmtree(asked.place(name, number).folder, ignore_errors=True)  # outside of the next one's timer
            asked.progress(asked.answer, f"{number + 1} of {count}: {_outcome(asked.answer, name, measured)}")


def _outcome(answer: Answer, name: str, measured: Fields | None) -> str:
    return f"{name} failed: {answer.failed[name]}" if measured is None else f"{name} took {measured['process_s']:.1f} s"


def _present(question: Question, scale: Scale, answer: Answer) -> dict[str, Contestant]:
    present = {}
    for name, contestant in question.contestants.items():
        if not is_importable(contestant.module):
            answer.skipped[name] = f"{contestant.module} is not installed"
        elif contestant.is_dispensable and not scale.with_all_rivals:
            answer.skipped[name] = f"left out of a {scale.name} run"
        else:
            present[name] = contestant
    return present


def is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _try(asked: _Round, name: str, repetition: int, runners: dict[str, Contestant]) -> Fields | None:
    place = asked.place(name, repetition)
    place.folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    try:
        measured = _in_a_process(asked.question.name, name, place)
    except MeasurementFailed as error:
        asked.answer.failed[name] = str(error)
        del runners[name]
        return None
    return {**measured, "process_s": time.perf_counter() - began}


# ---------------------------------------------------------------------- the process of a measurement


def _in_a_process(question: str, contestant: str, place: Place) -> dict[str, float]:
    """
    Measure in a fresh process, forked from one that has imported torch and done nothing with it.

    Raises:
        MeasurementFailed: It raised, died, or took longer than 15 minutes.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["benchmarks.questions", "torch._dynamo"])  # the second: optimizers do
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_measure, args=(question, contestant, place, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(TIMEOUT_S):
            raise MeasurementFailed(f"took longer than {TIMEOUT_S:.0f} s")
        is_good, result = ours.recv()
    except EOFError:
        process.join()
        raise MeasurementFailed(f"its process died with code {process.exitcode}") from None
    finally:
        _end(process)
        ours.close()
    if not is_good:
        raise MeasurementFailed(result)
    return result


def _end(process: multiprocessing.process.BaseProcess) -> None:
    process.join(10)  # a rival's leftover threads and children may want a moment
    if process.is_alive():
        process.kill()
        process.join()


def _measure(question: str, contestant: str, place: Place, results: Connection) -> None:
    from benchmarks.questions import QUESTIONS

    _hush()
    try:
        action = _action(QUESTIONS[question], contestant, place)
        results.send((True, {name: float(value) for name, value in (action(place) or {}).items()}))
    except BaseException as error:  # noqa: BLE001 - a process's edge: whoever waits gets it, by name
        results.send((False, f"{type(error).__name__}: {error}"))


def _action(question: Question, contestant: str, place: Place) -> Callable[[Place], Mapping[str, float] | None]:
    if contestant == SHARED:
        assert question.shares is not None
        return question.shares
    asked = question.contestants[contestant]
    if place.repetition == BEFORE:
        assert asked.prepare is not None
        return asked.prepare
    return asked.run


def _hush() -> None:
    """Rivals print warnings and progress; the table is not the place for them."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
