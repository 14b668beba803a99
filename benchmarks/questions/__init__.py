"""The questions, in the order of the table."""

from __future__ import annotations

from benchmarks.harness import Question
from benchmarks.questions import catalog, commit, copy, durable, frozen, loop, many, memory, remote, restore, stall

QUESTIONS: dict[str, Question] = {
    question.name: question
    for question in (
        stall.QUESTION,
        durable.QUESTION,
        restore.QUESTION,
        memory.QUESTION,
        many.QUESTION,
        frozen.QUESTION,
        catalog.QUESTION,
        commit.QUESTION,
        loop.QUESTION,
        copy.QUESTION,
        remote.QUESTION,
    )
}
