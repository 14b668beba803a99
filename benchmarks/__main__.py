"""The command: run the questions, or report on a run."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import benchmarks
from benchmarks import system
from benchmarks.harness import Answer, ask
from benchmarks.questions import QUESTIONS
from benchmarks.report import markdown, publish
from benchmarks.results import Joined, Results, joined, read_results, write_results
from benchmarks.scale import FULL, SCALES, Scale

HOME = Path(__file__).parents[1]
WITH_A_SERVER = ("remote",)
"""What takes as long as several others, and is asked by name where the run is not a full one."""


def main() -> int:
    """Exit with 1 if ckptman or a floor could not be measured: figures without it are worth nothing."""
    arguments = _arguments()
    if arguments.report is not None:
        publish(joined([read_results(path) for path in arguments.report]), HOME)
        return 0
    scale = SCALES["quick" if arguments.quick else arguments.scale]
    results = run(
        scale,
        questions=arguments.only or [name for name in QUESTIONS if scale is FULL or name not in WITH_A_SERVER],
        directory=arguments.directory,
        repetitions=arguments.repetitions,
        seed=arguments.seed,
        kept_in=arguments.json,
    )
    print(markdown(Joined((results,))))
    return 1 if unmeasured(results) else 0


def run(
    scale: Scale,
    *,
    questions: list[str],
    directory: Path | None,
    repetitions: int | None,
    seed: int,
    kept_in: Path | None = None,
) -> Results:
    """
    Ask *questions* one after the other; what is measured is the disk of *directory*.

    What is known is put into *kept_in* whenever a contestant was measured: a run that is interrupted has it there.
    """
    began, began_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    answers: dict[str, Answer] = {}

    def known() -> Results:
        duration_s = time.monotonic() - began
        return Results(machine=machine, scale=scale.name, began_at=began_at, duration_s=duration_s, answers=answers)

    def tell(done: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {done}", file=sys.stderr, flush=True)

    def keep(name: str, answer: Answer, done: str) -> None:
        answers[name] = answer
        tell(f"{name}, {done}")
        if kept_in is not None:
            write_results(known(), kept_in)

    with tempfile.TemporaryDirectory(dir=directory, prefix="ckptman-bench-") as folder:
        machine = system.machine(Path(folder))
        for name in questions:
            tell(QUESTIONS[name].asks)
            answers[name] = ask(
                QUESTIONS[name],
                scale,
                folder=Path(folder) / name,
                repetitions=repetitions,
                seed=seed,
                progress=partial(keep, name),
            )
    return known()


def unmeasured(results: Results) -> list[str]:
    """Contestants that must not fail, and did."""
    return [
        f"{question}: {name}: {reason}"
        for question, answer in results.answers.items()
        for name, reason in answer.failed.items()
        if name.startswith(("ckptman", "floor"))
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=benchmarks.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="the same as --scale quick")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--only", type=_names, help=f"some of {','.join(QUESTIONS)}")
    parser.add_argument("--repetitions", type=int, help="instead of what the scale says")
    parser.add_argument("--directory", type=Path, help="where to write: the disk that is measured")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the contestants")
    parser.add_argument("--json", type=Path, help="where every sample goes, as soon as it is taken")
    written = "write tables and plots of that run, or of its parts, into docs/"
    parser.add_argument("--report", type=Path, nargs="+", metavar="JSON", help=written)
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in QUESTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such question: {', '.join(unknown)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
