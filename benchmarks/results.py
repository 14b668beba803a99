"""A run as JSON: the machine's facts, every sample, and the verdicts. All tables and plots come from this file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.figures import Verdict, judge
from benchmarks.harness import Answer, Question
from benchmarks.questions import QUESTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """One run. ``answers`` has the questions that were asked, by name."""

    machine: Mapping[str, object]
    scale: str
    began_at: str
    duration_s: float
    answers: Mapping[str, Answer]

    def verdicts(self, question: Question) -> list[Verdict]:
        """One for each target that was measured."""
        answer = self.answers[question.name]
        found = (judge(target, answer.repetitions, is_full=self.scale == "full") for target in question.targets)
        return [verdict for verdict in found if verdict is not None]

    @property
    def asked(self) -> list[Question]:
        return [question for name, question in QUESTIONS.items() if name in self.answers]


def write_results(results: Results, path: Path) -> None:
    """Put *results* into *path*, with the verdicts beside the samples."""
    document = {
        "machine": results.machine,
        "scale": results.scale,
        "began_at": results.began_at,
        "duration_s": round(results.duration_s, 1),
        "questions": {question.name: _entry(results, question) for question in results.asked},
    }
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)  # whoever is interrupted here keeps what was there


def _entry(results: Results, question: Question) -> dict[str, object]:
    return {
        "asks": question.asks,
        "verdicts": [dataclasses.asdict(verdict) for verdict in results.verdicts(question)],
        **dataclasses.asdict(results.answers[question.name]),
    }


def read_results(path: Path) -> Results:
    """What `write_results` has written; verdicts are made anew from the samples."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return Results(
        machine=document["machine"],
        scale=document["scale"],
        began_at=document["began_at"],
        duration_s=document["duration_s"],
        answers={
            name: Answer(repetitions=entry["repetitions"], skipped=entry["skipped"], failed=entry["failed"])
            for name, entry in document["questions"].items()
        },
    )


@dataclass(frozen=True, slots=True)
class Joined:
    """Runs of one machine that are reported together, each of other questions and perhaps of another scale."""

    runs: tuple[Results, ...]

    @property
    def asked(self) -> list[Question]:
        return [question for question in QUESTIONS.values() if any(question.name in run.answers for run in self.runs)]

    def run_of(self, question: Question) -> Results:
        """The run that answers *question*."""
        return next(run for run in self.runs if question.name in run.answers)

    def answer_of(self, question: Question) -> Answer:
        return self.run_of(question).answers[question.name]

    def only(self, names: Container[str]) -> Joined:
        """The questions with *names*, and the runs that asked them."""
        parts = (_of(run, names) for run in self.runs)
        return Joined(tuple(part for part in parts if part.answers))


def joined(parts: Sequence[Results]) -> Joined:
    """
    What was run in *parts*. Of a question that several have asked, the last one's answer counts.

    Raises:
        ValueError: They are of different machines.
    """
    if any(one.machine != parts[0].machine for one in parts):
        raise ValueError("these are runs of different machines: report each by itself")
    last = {name: part for part in parts for name in part.answers}
    counting = (_of(part, [name for name, of in last.items() if of is part]) for part in parts)
    return Joined(tuple(part for part in counting if part.answers))


def _of(run: Results, names: Container[str]) -> Results:
    return replace(run, answers={name: answer for name, answer in run.answers.items() if name in names})
