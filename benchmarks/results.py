"""A run as JSON: the machine's facts, every sample, and the verdicts. All tables and plots come from this file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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


def joined(parts: Sequence[Results]) -> Results:
    """
    The run that was made in *parts*, each of other questions. Of a question that several have, the last one's counts.

    Raises:
        ValueError: They are of different scales, or of different machines.
    """
    first, *others = parts
    if any((one.scale, one.machine) != (first.scale, first.machine) for one in others):
        raise ValueError("these are runs of different scales, or of different machines: report each by itself")
    return Results(
        machine=first.machine,
        scale=first.scale,
        began_at=min(one.began_at for one in parts),
        duration_s=sum(one.duration_s for one in parts),
        answers={name: answer for one in parts for name, answer in one.answers.items()},
    )
