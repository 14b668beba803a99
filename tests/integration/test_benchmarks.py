"""The benchmarks run, measure what they say, and their statistics are right. No figure is judged here."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from s3_server import S3Server

from benchmarks import __main__ as command
from benchmarks import harness, plots, ranks, report, results, system
from benchmarks.figures import Target, judge, lowest, pairs, ratios, summarise
from benchmarks.harness import Answer, Contestant, Place, Question
from benchmarks.kept import keep, kept
from benchmarks.questions import QUESTIONS
from benchmarks.rivals import RIVALS, TorchSave
from benchmarks.scale import TINY
from benchmarks.server import announce
from benchmarks.states import State, adapted, trained
from benchmarks.units import unit_for

OURS = [
    (question.name, name)
    for question in QUESTIONS.values()
    for name in question.contestants
    if name.startswith(("ckptman", "floor"))
]


def place_in(folder: Path) -> Place:
    """With nothing in it."""
    place = Place(folder=folder, scale=TINY, repetition=0, shared=folder.with_name("shared"))
    place.folder.mkdir()
    place.shared.mkdir()
    return place


@pytest.mark.parametrize(("question", "contestant"), OURS)
def test_every_case_runs_at_a_tiny_size_and_yields_its_fields(
    question: str, contestant: str, tmp_path: Path, s3_server: S3Server
) -> None:
    """Each contestant of ours, and each floor, measures every column and target that the tables promise of it."""
    asked = QUESTIONS[question]
    announce(s3_server.port, tmp_path)
    place = place_in(tmp_path / "place")
    if asked.shares is not None:
        asked.shares(place)
    if (prepare := asked.contestants[contestant].prepare) is not None:
        prepare(place)
    measured = asked.contestants[contestant].run(place)
    assert all(isinstance(value, (int, float)) for value in measured.values())
    columns = {column.field for column in asked.columns}
    assert columns & set(measured)
    wanted = {target.field for target in asked.targets if target.contestant == contestant}
    wanted |= {target.floor_field for target in asked.targets if contestant in target.floor}
    assert wanted <= set(measured)


def test_all_names_of_every_question_exist() -> None:
    """A target or a floor that names nobody would be silently absent from the table."""
    assert (len(QUESTIONS), len(OURS)) == (11, 31)
    assert sum(len(question.targets) for question in QUESTIONS.values()) == 21
    for question in QUESTIONS.values():
        named = {target.contestant for target in question.targets}
        named |= {floor for target in question.targets for floor in target.floor}
        named |= {floor for column in question.columns for floor in column.floors}
        assert named <= set(question.contestants)


def test_a_load_that_does_not_reach_the_live_objects_is_no_measurement(tmp_path: Path) -> None:
    """A tool that loads elsewhere, or lazily, fails instead of winning."""
    from benchmarks.questions.restore import prepare, restore

    class Lazy(TorchSave):
        def load(self, step: int) -> None:
            """Do nothing, fast."""

    place = place_in(tmp_path / "place")
    keep(place)
    prepare(TorchSave, place)
    restore(TorchSave, place)
    with pytest.raises(AssertionError, match="not what was saved"):
        restore(Lazy, place)


def test_a_kept_state_is_the_trained_one_and_trains_on(tmp_path: Path) -> None:
    """Bit for bit, moments and their counts included, in memory that no other contestant has."""
    place = place_in(tmp_path / "place")
    keep(place)
    first, second, expected = kept(place), kept(place), trained(TINY)
    assert list(first.tensors) == list(expected.tensors)
    assert all(tensor.equal(first.tensors[name]) for name, tensor in expected.tensors.items())
    first.train_step()
    assert first.fingerprint() != expected.fingerprint() == second.fingerprint()
    assert {float(moments["step"]) for moments in first.optimizer.state.values()} == {3.0}


@pytest.mark.parametrize("change", [State.train_step, State.change])
def test_a_change_leaves_nothing_to_borrow(change: Callable[[State], None]) -> None:
    """A training step, and what stands for one where nobody measures steps, change every tensor of the full state."""
    state = trained(TINY)
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    change(state)
    assert [name for name, tensor in state.tensors.items() if tensor.equal(before[name])] == []


def test_a_training_step_changes_no_frozen_tensor() -> None:
    """Of the adapted state, all but the adapters and their moments can be borrowed."""
    frozen = adapted(TINY)
    before = {name: tensor.clone() for name, tensor in frozen.tensors.items()}
    frozen.train_step()
    changed = [name for name, tensor in frozen.tensors.items() if not tensor.equal(before[name])]
    assert changed
    assert all(re.search(r"\.(up|down)$|^optimizer", name) for name in changed)


# ---------------------------------------------------------------------- the harness


def answer_of(tmp_path: Path, **contestants: Contestant) -> Answer:
    question = Question(name="stall", asks="?", contestants=contestants, columns=(), targets=())
    return harness.ask(question, TINY, folder=tmp_path, repetitions=2)


def test_who_is_not_installed_is_skipped_by_name(tmp_path: Path) -> None:
    """A missing module is a reason in the answer, never a hole; so is one whose parent is missing."""
    missing = Contestant(run=lambda place: {}, module="no_such_module")
    answer = answer_of(tmp_path, rival=missing, other=Contestant(run=lambda place: {}, module="no_such.module"))
    assert answer.skipped == {"rival": "no_such_module is not installed", "other": "no_such.module is not installed"}
    assert answer.repetitions == [{}, {}]


def test_who_fails_is_named_with_the_error_and_out(tmp_path: Path) -> None:
    """The process finds contestants by name: one that its question lacks fails there, once, and not silently."""
    answer = answer_of(tmp_path, nobody=Contestant(run=lambda place: {}))
    assert answer.failed == {"nobody": "KeyError: 'nobody'"}
    assert answer.repetitions == [{}, {}]


def test_a_question_is_asked_in_processes_of_their_own(tmp_path: Path) -> None:
    """What a real question measures comes back through the harness, for each repetition."""
    answer = harness.ask(QUESTIONS["commit"], TINY, folder=tmp_path, repetitions=2)
    assert answer.failed == answer.skipped == {}
    assert [set(one) for one in answer.repetitions] == [{"ckptman"}, {"ckptman"}]
    assert all(one["ckptman"]["seconds"] > 0 for one in answer.repetitions)


# ---------------------------------------------------------------------- the statistics

SAMPLES: list[Mapping[str, Mapping[str, float]]] = [
    {"ckptman": {"seconds": 2.0}, "slow": {"seconds": 2.0}, "fast": {"seconds": 1.0}},
    {"ckptman": {"seconds": 30.0}, "slow": {"seconds": 10.0}, "fast": {"seconds": 20.0}},
    {"ckptman": {"seconds": 8.0}, "fast": {"seconds": 2.0}},
    {"slow": {"seconds": 1.0}},
]
FLOORS = ("slow", "fast")


def target(**changes: object) -> Target:
    fields: dict[str, object] = {
        "label": "t", "contestant": "ckptman", "field": "seconds", "kind": "ratio", "limit": 1.5, "floor": FLOORS,
    }  # fmt: skip
    return Target(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_floor_is_the_lowest_of_each_repetition() -> None:
    assert [lowest(one, FLOORS, "seconds") for one in SAMPLES] == [1.0, 10.0, 2.0, 1.0]
    assert lowest(SAMPLES[0], ["nobody"], "seconds") is None


def test_ratios_are_formed_within_a_repetition() -> None:
    """Figures of different repetitions are never held against each other; one without its pair does not count."""
    assert pairs(SAMPLES, "ckptman", "seconds", FLOORS, "seconds") == [(2.0, 1.0), (30.0, 10.0), (8.0, 2.0)]
    assert ratios(SAMPLES, "ckptman", "seconds", FLOORS, "seconds") == [2.0, 3.0, 4.0]


def test_a_summary_has_the_median_and_the_spread() -> None:
    found = summarise([5.0, 1.0, 2.0])
    assert (found.median, found.low, found.high, found.count) == (2.0, 1.0, 5.0, 3)
    with pytest.raises(ValueError, match="nothing was measured"):
        summarise([])


@pytest.mark.parametrize(
    ("changes", "compared", "is_met", "missed_by"),
    [
        ({"limit": 1.5}, 3.0, False, 1.0),
        ({"limit": 3.0}, 3.0, True, 0.0),
        ({"kind": "above", "limit": 5.0}, 6.0, False, 0.2),
        ({"kind": "absolute", "limit": 16.0, "floor": ()}, 8.0, True, 0.0),
        ({"limit": 1.5, "scales": False}, 3.0, None, 1.0),
    ],
    ids=["ratio missed", "ratio met", "difference", "absolute", "cannot be judged"],
)
def test_a_verdict_says_by_how_much(
    changes: dict[str, object], compared: float, is_met: bool | None, missed_by: float
) -> None:
    verdict = judge(target(**changes), SAMPLES, is_full=False)
    assert verdict is not None
    assert (verdict.compared.median, verdict.is_met) == (compared, is_met)
    assert verdict.missed_by == pytest.approx(missed_by)


def test_what_was_not_measured_has_no_verdict() -> None:
    assert judge(target(contestant="nobody"), SAMPLES, is_full=True) is None
    assert judge(target(floor=("nobody",)), SAMPLES, is_full=True) is None


@pytest.mark.parametrize(
    ("field", "values", "text"),
    [("x_s", [0.002, 5.0, 0.001], "2.00 ms"), ("seconds", [3e-6], "3.00 µs"), ("nbytes", [3 << 20], "3.00 MiB")],
)
def test_a_column_has_the_unit_of_its_middle_value(field: str, values: list[float], text: str) -> None:
    assert unit_for(field, values).text(values[0]) == text


# ---------------------------------------------------------------------- raw bytes and the report


@pytest.mark.parametrize("write", [{}, {"early": True}, {"direct": True}], ids=["plain", "early", "direct"])
@pytest.mark.parametrize("threads", [1, 4])
def test_the_floors_write_and_read_every_byte(write: dict[str, bool], threads: int, tmp_path: Path) -> None:
    """A floor that skips bytes would be too low."""
    nbytes = 5 * system.CHUNK // 2
    payload = system.aligned(nbytes)
    payload[:] = bytes(range(256)) * (len(payload) // 256)
    try:
        system.write_raw(tmp_path / "raw", payload, **write)
    except OSError:
        pytest.skip("no O_DIRECT here")
    assert (tmp_path / "raw").read_bytes() == payload
    buffers = [system.aligned(system.CHUNK) for _ in range(threads)]
    system.read_raw(tmp_path / "raw", nbytes, buffers=buffers)
    rest = bytes(payload[2 * system.CHUNK :])
    assert any(bytes(buffer[: len(rest)]) == rest for buffer in buffers)


def test_extra_memory_is_what_was_allocated_meanwhile() -> None:
    kept: list[bytearray] = []
    grown = system.extra_nbytes(lambda: kept.append(bytearray(b"x") * (32 << 20)))
    assert 31 << 20 <= grown <= 40 << 20
    assert system.extra_nbytes(lambda: None) < 4 << 20


def run_of(home: Path) -> results.Results:
    seconds = {"ckptman": {"seconds": 1.2}, "floor: pwrite + fsync": {"seconds": 1.0}, "DCP": {"seconds": 3.0}}
    answer = Answer(repetitions=[seconds] * 3, skipped={"moonclip": "moonclip is not installed"})  # type: ignore[list-item]
    made = results.Results(
        machine={"cores": 2},
        scale="full",
        began_at="now",
        duration_s=60.0,
        answers={"durable": answer, "stall": Answer(failed={"ckptman": "Error: no"})},
    )
    results.write_results(made, home / "results.json")
    return results.read_results(home / "results.json")


def test_a_report_goes_between_the_markers_and_leaves_the_rest(tmp_path: Path) -> None:
    """Published twice it is the same page; the JSON has the samples and the verdict."""
    page = tmp_path / report.PAGE
    page.parent.mkdir(parents=True)
    page.write_text(f"before\n{report.BEGIN}\nstale figures\n{report.END}\nafter\n", encoding="utf-8")
    read = run_of(tmp_path)
    report.publish(results.joined([read]), tmp_path)
    text = page.read_text("utf-8")
    report.publish(results.joined([read]), tmp_path)
    assert page.read_text("utf-8") == text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale figures" not in text
    assert "**missed by 9%**" in text
    assert "moonclip (moonclip is not installed)" in text
    assert "| stall, later saves | – | – | – | – | **not measured** |" in text
    document = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert document["questions"]["durable"]["verdicts"][0]["is_met"] is False
    ElementTree.fromstring((page.parent / "performance" / "durable.svg").read_text("utf-8"))


def test_object_stores_have_a_place_of_their_own(tmp_path: Path) -> None:
    """A run of that question alone leaves the tables of the others as they are."""
    page = tmp_path / report.PAGE
    page.parent.mkdir(parents=True)
    page.write_text(
        f"{report.BEGIN}\nkept\n{report.END}\n{report.REMOTE_BEGIN}\nstale\n{report.END}\n", encoding="utf-8"
    )
    answer = Answer(repetitions=[{"ckptman": {"upload_s": 1.0}}])
    report.publish(results.joined([replace(run_of(tmp_path), answers={"remote": answer})]), tmp_path)
    text = page.read_text("utf-8")
    assert "kept" in text
    assert "stale" not in text
    assert "| upload, s |" in text


def test_a_run_made_in_parts_says_which_part_had_which_scale(tmp_path: Path) -> None:
    """Each question has its last answer, and its own scale in every table; other machines' runs are not mixed in."""
    first = run_of(tmp_path)
    loop = Answer(repetitions=[{"ckptman": {"period_s": 2.0, "plain_period_s": 1.5, "nbytes": 3e6}}])
    second = replace(first, scale="quick", began_at="later", answers={"loop": loop, "stall": Answer()})
    text = report.markdown(results.joined([first, second]))
    assert "| durable | full | now | 1 min |" in text
    assert "| loop, stall | quick | later | 1 min |" in text
    assert re.search(r"\| time to durable.*\*\*missed by 9%\*\* \| full \|", text)
    assert re.search(r"\| slowdown of a loop that saves every 60 s \|.*not judged: a scaled run \| quick \|", text)
    assert "Scale: quick, states of 3 MB; repetitions: 1." in text
    assert "Failed: ckptman" not in text
    with pytest.raises(ValueError, match="report each by itself"):
        results.joined([first, replace(second, machine={"cores": 3})])


def test_who_was_measured_less_often_than_others_is_shown_so() -> None:
    answer = Answer(repetitions=[{"DCP": {"seconds": 3.0}, "ckptman": {"seconds": 1.0}}, {"ckptman": {"seconds": 2.0}}])
    table = report.contestants(QUESTIONS["durable"], answer)
    assert "| DCP (1 of 2) |" in table
    assert "| **ckptman** |" in table


def test_a_run_that_is_interrupted_has_kept_what_was_measured(tmp_path: Path) -> None:
    """The JSON has each contestant as soon as it is measured: here, all but what comes after the first one."""
    kept_in = tmp_path / "results.json"

    class Interrupted(Exception):
        pass

    def interrupt(answer: Answer, done: str) -> None:
        if answer.repetitions and answer.repetitions[0]:
            raise Interrupted

    real = harness.ask
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(
            command,
            "ask",
            lambda *args, progress, **more: real(
                *args, progress=lambda *known: (progress(*known), interrupt(*known)), **more
            ),
        )
        command.run(TINY, questions=["catalog"], directory=tmp_path, repetitions=3, seed=0, kept_in=kept_in)
    assert len(results.read_results(kept_in).answers["catalog"].repetitions[0]) == 1


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / report.PAGE
    page.parent.mkdir(parents=True)
    page.write_text("no markers\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no place for the tables"):
        report.publish(results.joined([run_of(tmp_path)]), tmp_path)
    assert page.read_text("utf-8") == "no markers\n"


def test_a_plot_shows_contestants_and_the_floor_as_a_line() -> None:
    """Bars for those who save, shortest first; floors are no bars."""
    answer = Answer(
        repetitions=[{"DCP": {"seconds": 3.0}, "ckptman": {"seconds": 1.5}, "floor: pwrite + fsync": {"seconds": 1.0}}]
    )
    svg = plots.plot(QUESTIONS["durable"], answer)
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]
    assert [text for text in texts if text in ("ckptman", "DCP")] == ["ckptman", "DCP"]
    assert "floor 1.00 s" in texts
    assert not any(text and text.startswith("floor:") for text in texts)


@pytest.mark.parametrize("tool", [tool for tool in RIVALS if harness.is_importable(tool.module)], ids=lambda t: t.name)
def test_every_rival_that_is_installed_takes_part(tool: type, tmp_path: Path) -> None:
    """It saves, and loads into live objects."""
    contestant = QUESTIONS["restore"].contestants[tool.name]
    place = place_in(tmp_path / "place")
    keep(place)
    assert isinstance(contestant.run, partial)
    assert contestant.prepare is not None
    contestant.prepare(place)
    assert contestant.run(place)["seconds"] > 0


def test_four_ranks_are_measured_and_nothing_of_ours_is_left_out(tmp_path: Path) -> None:
    """Every target of the benchmark of many ranks gets its verdict, from whole restores."""
    document = ranks.run(tmp_path, mib=4, repetitions=1, pause_s=0)
    assert len(document["verdicts"]) == len(ranks.TARGETS)
    assert set(document["repetitions"][0]["ckptman"]) == set(ranks.TITLES)
    assert all(title in ranks.report(document) for title in ranks.TITLES.values())
