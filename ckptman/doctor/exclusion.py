"""What other processes see, and what they are kept from: create-only, locks, and the freshness of listings."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

from ckptman.doctor.findings import Finding, duration
from ckptman.doctor.partner import Partner
from ckptman.errors import StorageError
from ckptman.repository.file_lock import RootLock
from ckptman.storage.base import KeyChanged, KeyExists, KeyMissing, Storage, Swaps

RACERS = 3
ROUNDS = 60
LISTINGS = 10
STALE_S = 10.0
"""How long a listing is waited for to show a key, to tell how stale it is."""


def look(storage: Storage, root: str, folder: str) -> Iterator[Finding]:
    """The findings; *root* is how other processes open the storage, and *folder* the examination's."""
    yield _double_put(storage, folder)
    with ExitStack() as stack:
        partners = [stack.enter_context(Partner(root)) for _ in range(RACERS)]
        seen = [partner.sees(f"{folder}/double") for partner in partners]
        if not all(seen):
            what = "another process on this machine that opens the same root does not see what is written to it"
            yield Finding(name="seen by others", verdict="bad", what=what)
            return
        yield Finding(name="seen by others", verdict="ok", what="another process sees what is written")
        yield _race(storage, folder, partners)
        yield _locks(storage, folder, partners[0])
        yield _freshness(storage, folder, partners[1])


def _double_put(storage: Storage, folder: str) -> Finding:
    key = f"{folder}/double"
    storage.create(key, b"first")
    try:
        storage.create(key, b"second")
    except KeyExists:
        if storage.read(key, limit=16) == b"first":
            return Finding(name="create-only put", verdict="ok", what="a second put of a key fails and changes nothing")
    what = "a second put of a key replaced the first one: two writers could both commit, and one would lose its save"
    return Finding(name="create-only put", verdict="bad", what=what)


def _race(storage: Storage, folder: str, partners: Sequence[Partner]) -> Finding:
    tokens = [secrets.token_hex(8) for _ in partners]
    for partner, token in zip(partners, tokens, strict=True):
        partner.begin("race", folder=folder, rounds=ROUNDS, token=token)
    won = {token: partner.outcome() for partner, token in zip(partners, tokens, strict=True)}
    return judge_race(storage, won, name="create-only race", who="processes")


def judge_race(storage: Storage, won: Mapping[str, Sequence[str]], *, name: str, who: str) -> Finding:
    """*won* are the keys that each token's racer believes to have created: each must have one creator, and hold it."""
    winners = Counter(key for keys in won.values() for key in keys)
    twice = [key for key, count in winners.items() if count > 1]
    wrong = [key for token, keys in won.items() for key in keys if _content(storage, key) != token.encode()]
    figures = {"keys": len(winners), "racers": len(won), "double_wins": len(twice), "lost": len(wrong)}
    if not winners:
        return Finding(name=name, verdict="bad", what="nobody could create a key", figures=figures)
    if twice or wrong:
        what = f"of {len(winners)} keys {len(twice)} had more than one creator, and {len(wrong)} hold another's bytes"
        return Finding(name=name, verdict="bad", what=what, figures=figures)
    what = f"{len(won)} {who} raced for {len(winners)} keys, and each key had one winner"
    return Finding(name=name, verdict="ok", what=what, figures=figures)


def _content(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.read(key, limit=1 << 10)
    except KeyMissing:
        return None


def _locks(storage: Storage, folder: str, partner: Partner) -> Finding:
    name, key = "locks", f"{folder}/probe.lock"
    if storage.lock_path is None:
        return _lease(storage, f"{folder}/lease")
    ours = RootLock(storage.lock_path.parent / key)
    try:
        partner.hold(key)
        if ours.acquire(0):
            ours.release()
            return Finding(name=name, verdict="bad", what="two processes held one lock: two jobs could write at once")
        began = time.monotonic()
        partner.kill()
        if not ours.acquire(5):
            what = "the lock of a process that was killed is not free: a job that died would block the next one"
            return Finding(name=name, verdict="bad", what=what)
        ours.release()
    except StorageError as error:
        return Finding(name=name, verdict="bad", what=str(error))
    freed_s = time.monotonic() - began
    what = f"a second process is kept out, and a killed one's lock is free after {duration(freed_s)}"
    return Finding(name=name, verdict="ok", what=what, figures={"freed_s": freed_s})


def _lease(storage: Storage, key: str) -> Finding:
    """Where no file lock reaches, writers hold a lease, if a value can be changed by one of two only."""
    if not isinstance(storage, Swaps) or not storage.can_swap:
        what = (
            "neither file locks nor compare-and-swap: a second job may start beside a first one. It fences it, so no "
            "saved checkpoint is lost, but the first one's work from then on is"
        )
        return Finding(name="locks", verdict="unknown", what=what)
    storage.create(key, b"0")
    _, version = storage.read_version(key, limit=16)
    storage.swap(key, b"1", expected=version)
    try:
        storage.swap(key, b"2", expected=version)
    except KeyChanged:
        if storage.read_version(key, limit=16)[0] == b"1":
            return Finding(name="locks", verdict="ok", what="of two changes of one value the second one is refused")
    what = "two changes of one value both succeeded: two jobs could hold the lease at once, and one would be fenced"
    return Finding(name="locks", verdict="bad", what=what)


def _freshness(storage: Storage, folder: str, partner: Partner) -> Finding:
    worst_s = 0.0
    for number in range(LISTINGS):
        key = f"{folder}/fresh-{number}"
        partner.create(key)
        began = time.monotonic()
        while key not in {stored.key for stored in storage.listing(folder)}:
            if time.monotonic() - began > STALE_S:
                what = f"a listing did not show another process's key within {STALE_S:g} s: saves would be missed"
                return Finding(name="listings", verdict="bad", what=what)
            worst_s = time.monotonic() - began
            time.sleep(0.01)
    figures = {"stale_s": worst_s}
    if worst_s:
        what = f"a listing showed another process's key only after {duration(worst_s)}: saves could be missed so long"
        return Finding(name="listings", verdict="bad", what=what, figures=figures)
    return Finding(name="listings", verdict="ok", what="show at once what another process wrote", figures=figures)
