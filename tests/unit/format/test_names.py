"""Names: what is accepted, what is refused, and that nothing else passes for an attempt or a record."""

from __future__ import annotations

import pytest

from ckptman.errors import FormatError
from ckptman.format.names import (
    MAX_STEP,
    Attempt,
    check_attempt,
    check_component,
    check_data_key,
    check_metric,
    check_step,
    check_tag,
    data_key,
    manifest_key,
    record_key,
    record_number,
)

GOOD_COMPONENTS = ["a", "model", "0", "lr-scheduler.v2_b", "x" * 64, "model.rank", "rank-1", "nulls", "com10", "latest"]
BAD_COMPONENTS = [
    *("", ".", "..", ".hidden", "-x", "_x", "a/b", "a\\b", "a b", "a\n", "a\0", "é", "x" * 65, "٣", None, 3, b"a"),
    *("nul", "NUL", "con", "Aux", "com1", "lpt9.txt", "nul.model", "model.rank-1", "model.rank-00001"),
]
BAD_TAGS = ["", "latest", "7", "007", "a/b", "../x", "-x", "x" * 65, "a\n", None, 3]


@pytest.mark.parametrize("name", GOOD_COMPONENTS)
def test_good_components_are_returned_and_make_valid_keys(name: str) -> None:
    """What `check_component` accepts can name a file of an attempt."""
    assert check_component(name) == name
    assert check_data_key(data_key("step-000000000001.w0001.00000000", name))


@pytest.mark.parametrize("name", BAD_COMPONENTS)
def test_bad_components_are_refused_by_name(name: object) -> None:
    """The message quotes what was refused."""
    with pytest.raises(ValueError, match="cannot name a component") as caught:
        check_component(name)  # type: ignore[arg-type]
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["best", "v1.0", "0x7", "Latest", "nul", "x" * 64])
def test_good_tags(name: str) -> None:
    """Tags name no file: device names are fine."""
    assert check_tag(name) == name


@pytest.mark.parametrize("name", BAD_TAGS)
def test_bad_tags(name: object) -> None:
    """Nothing that could be taken for a step or for ``latest`` is a tag."""
    with pytest.raises(ValueError, match="cannot be a tag"):
        check_tag(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [0, 1, MAX_STEP])
def test_good_steps(step: int) -> None:
    """The ends of the range belong to it."""
    assert check_step(step) == step


@pytest.mark.parametrize(("step", "kind"), [(-1, ValueError), (2**63, ValueError), (True, TypeError), (1.0, TypeError)])
def test_bad_steps(step: object, kind: type[Exception]) -> None:
    """Numbers out of range are ValueErrors, other things TypeErrors."""
    with pytest.raises(kind, match="step must be"):
        check_step(step)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "a\x7f", "\0", None])
def test_bad_metrics(name: object) -> None:
    """Metric names print on one line."""
    with pytest.raises(ValueError, match="cannot name a metric"):
        check_metric(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [0, 999, 10**12 - 1, 10**12, MAX_STEP])
@pytest.mark.parametrize("epoch", [1, 9999, 10_000, 10**17])
def test_attempts_survive_their_text(step: int, epoch: int) -> None:
    """parse(str(attempt)) is the attempt, also where numbers outgrow their padding."""
    attempt = Attempt(step=step, epoch=epoch, nonce="0123abcd")
    assert Attempt.parse(str(attempt)) == check_attempt(str(attempt)) == attempt


@pytest.mark.parametrize(
    "text",
    [
        "",
        "step-1.w0001.0123abcd",
        "step-000000000001.w1.0123abcd",
        "step-000000000001.w0001.0123ABCD",
        "step-000000000001.w0001.0123abc",
        "step-000000000001.w0001.0123abcd ",
        "step-000000000001.w0001.0123abcd\n",
        "step-000000000001.w0001.0123abcd/x",
        "step-0000000000001.w0001.0123abcd",  # one zero too many: another spelling of step 1
        "step-000000000001.w00001.0123abcd",
        "step-9223372036854775808.w0001.0123abcd",
        "step-٠٠٠٠٠٠٠٠٠٠٠١.w0001.0123abcd",
        "step-000000000001.w" + "1" * 5000 + ".0123abcd",
        "Step-000000000001.w0001.0123abcd",
    ],
)
def test_what_is_not_exactly_an_attempt_is_none(text: str) -> None:
    """One attempt has one spelling; foreign folders are never taken for one."""
    assert Attempt.parse(text) is None
    with pytest.raises(FormatError, match="not the name of an attempt"):
        check_attempt(text)


def test_record_keys() -> None:
    """A record's key gives its number back; nothing else does."""
    assert record_key(42) == "catalog/000000000042.json"
    assert record_number(record_key(42)) == 42
    assert record_number(record_key(10**12 - 1)) == 10**12 - 1
    others = ["catalog/42.json", "catalog/000000000042.json.tmp", "000000000042.json", "catalog/٠٠٠٠٠٠٠٠٠٠٤٢.json"]
    assert [record_number(key) for key in [*others, record_key(0), "catalog/000000000042.json\n"]] == [None] * 6


@pytest.mark.parametrize(
    "key",
    [
        "../step-000000000001.w0001.0123abcd/a.safetensors",
        "/step-000000000001.w0001.0123abcd/a.safetensors",
        "step-000000000001.w0001.0123abcd/../a.safetensors",
        "step-000000000001.w0001.0123abcd/sub/a.safetensors",
        "step-000000000001.w0001.0123abcd\\a.safetensors",
        "step-000000000001.w0001.0123abcd/a\0.safetensors",
        "step-000000000001.w0001.0123abcd/nul.safetensors",
        "step-000000000001.w0001.0123abcd/C:a.safetensors",
        "step-000000000001.w0001.0123abcd/a.safetensors.",
        "step-000000000001.w0001.0123abcd/manifest.json",
        "catalog/a.safetensors",
        "a.safetensors",
        "step-000000000001.w0001.0123abcd/" + "a" * 600 + ".safetensors",
        "",
    ],
)
def test_hostile_data_keys_are_refused(key: str) -> None:
    """A data file lies directly in the folder of an attempt, under a name that every system can hold."""
    with pytest.raises(FormatError):
        check_data_key(key)


def test_manifest_key() -> None:
    """The manifest lies beside the data."""
    assert manifest_key("step-000000000001.w0001.0123abcd") == "step-000000000001.w0001.0123abcd/manifest.json"
