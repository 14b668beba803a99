"""The tree of errors: it pickles, it redacts, it says what to exit with."""

from __future__ import annotations

import pickle

import pytest

from ckptman import errors
from ckptman.errors import CkptmanError, IntegrityError, LockTimeout, Preempted, StorageError, redact

TREE = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, CkptmanError)]


@pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)
def test_every_error_survives_pickling(cls: type[CkptmanError]) -> None:
    """A rank's error can travel to another: its class, text and attributes arrive."""
    assert len(TREE) == 14
    error = cls("step 3 in s3://key:secret@bucket/run")
    error.add = "a fact"  # type: ignore[attr-defined]
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == "step 3 in s3://***@bucket/run"
    assert copy.add == "a fact"
    assert copy.exit_code == cls.exit_code


def test_slots_of_foreign_parents_survive_pickling() -> None:
    """``errno`` and ``code`` live outside of ``__dict__``, and arrive all the same."""
    assert pickle.loads(pickle.dumps(StorageError("full", errno=28, key="a"))).errno == 28
    assert pickle.loads(pickle.dumps(Preempted("saved", step=7))).code == 75
    assert pickle.loads(pickle.dumps(IntegrityError("x", step=1, file="f", tensor="t"))).tensor == "t"
    assert pickle.loads(pickle.dumps(LockTimeout("x", host="h", pid=3))).pid == 3


def test_errors_are_what_a_handler_expects() -> None:
    """Each is also the builtin error that stands in the contract."""
    assert issubclass(errors.CheckpointNotFound, LookupError)
    assert issubclass(errors.FormatError, ValueError)
    assert issubclass(errors.StateMismatch, ValueError)
    assert issubclass(errors.UnsupportedState, TypeError)
    assert issubclass(errors.LockTimeout, TimeoutError)
    assert issubclass(errors.StorageError, OSError)
    assert issubclass(errors.Preempted, SystemExit)


def test_redaction_hits_credentials_only() -> None:
    """``user:secret@`` goes, a plain URL and an e-mail address stay."""
    assert (
        redact("a s3://u:p@h/x and file:///y, mail me@example.org")
        == "a s3://***@h/x and file:///y, mail me@example.org"
    )
