"""Files of torch.save, in and out: bit for bit, streaming, and nothing run."""

import collections
import contextlib
import os
import pickle
import random
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_states import Run, assert_same, random_tensor, restored, zipped

from ckptman import CheckpointManager
from ckptman.convert import export_checkpoint, import_checkpoint
from ckptman.errors import FormatError, IntegrityError, SaveFailed, StorageError, UnsupportedState
from ckptman.format.dtypes import DTYPES
from ckptman.repository.repository import Repository
from ckptman.storage.local import LocalStorage


def saveable() -> list[str]:
    """The dtypes that torch.save can write."""
    sub_byte = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}  # have no storage
    return [name for name in DTYPES if hasattr(torch, name) and name not in sub_byte]


def test_every_dtype_makes_the_round_trip(tmp_path: Path) -> None:
    """Each type that torch.save can write comes in and goes out with the same bits, whatever its shape and strides."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in saveable():
        tensors[f"{dtype}.matrix"] = random_tensor(dtype, (3, 5), generator)
        tensors[f"{dtype}.scalar"] = random_tensor(dtype, (), generator)
        tensors[f"{dtype}.empty"] = random_tensor(dtype, (0, 2), generator)
        if dtype != "bits16":  # cannot be seen otherwise than flat
            tensors[f"{dtype}.turned"] = random_tensor(dtype, (3, 5), generator).T
    assert len(tensors) >= 95
    torch.save(tensors, tmp_path / "in.pt")
    imported = import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1)
    assert imported.kinds == {"model": "module"}
    export_checkpoint(tmp_path / "root", 1, tmp_path / "out.pt", to="torch")
    assert_same(tensors, torch.load(tmp_path / "out.pt", weights_only=True)["model"])
    mapped = torch.load(tmp_path / "out.pt", weights_only=True, mmap=True)["model"]
    assert_same(tensors, mapped)


def test_views_parameters_and_conjugates(tmp_path: Path) -> None:
    """What torch.save says about a tensor beyond its bytes is heeded."""
    base = torch.arange(24.0)
    complex_ = torch.randn(3, dtype=torch.complex64)
    tree = {
        "part": base[4:10],
        "stepped": base[::5],
        "wide": base[:3].expand(2, 3),
        "parameter": torch.nn.Parameter(base[:2].clone()),
        "conj": complex_.conj(),
        "neg": complex_.clone().conj().imag,
    }
    torch.save(tree, tmp_path / "in.pt")
    import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1)
    export_checkpoint(tmp_path / "root", 1, tmp_path / "out.pt", to="torch")
    out = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert_same({name: one.detach().resolve_conj().resolve_neg() for name, one in tree.items()}, out)


@pytest.mark.parametrize("named", [False, True])
def test_training_goes_on_bit_for_bit(tmp_path: Path, named: bool) -> None:
    """A torch checkpoint, imported and restored into live objects, continues as the run that wrote it."""
    run = Run(named=named)
    run.train(0, 3)
    torch.save({**run.states(), "epoch": 3}, tmp_path / "in.pt")
    losses = run.train(3, 6)

    imported = import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=3)
    kinds = {"model": "module", "optimizer": "optimizer" if named else "stateful", "scheduler": "stateful"}
    assert imported.kinds == {**kinds, "epoch": "value"}
    again = Run(seed=1, named=named)
    found = restored(tmp_path / "root", {**again.state, "epoch": 0})
    assert (found.step, found.values["epoch"]) == (3, 3)
    assert again.train(3, 6) == losses
    assert_same(run.model.state_dict(), again.model.state_dict())
    assert_same(run.optimizer.state_dict()["state"], again.optimizer.state_dict()["state"])
    assert run.optimizer.state_dict()["param_groups"] == again.optimizer.state_dict()["param_groups"]
    assert run.scheduler.state_dict() == again.scheduler.state_dict()


def test_what_ckptman_saved_goes_on_in_plain_torch(tmp_path: Path) -> None:
    """A checkpoint of ours, exported, is what plain torch needs to continue; and imported again, what we need."""
    run = Run()
    run.train(0, 3)
    with CheckpointManager(tmp_path / "root", {**run.state, "epoch": 3}) as manager:
        manager.save(3, block=True)
    losses = run.train(3, 6)
    export_checkpoint(tmp_path / "root", "latest", tmp_path / "out.pt", to="torch")

    plain = Run(seed=1)
    for name, state in torch.load(tmp_path / "out.pt", weights_only=True).items():
        if name in plain.state:
            plain.state[name].load_state_dict(state)
    assert plain.train(3, 6) == losses

    kinds = import_checkpoint(tmp_path / "again", tmp_path / "out.pt", step=3).kinds
    assert kinds["optimizer"] == "optimizer"  # the names of the parameters went with it
    ours = Run(seed=2)
    torch.manual_seed(5)
    with CheckpointManager(tmp_path / "again", {**ours.state, "epoch": 0}) as manager:
        manager.restore()
    assert ours.train(3, 6) == losses


def test_random_streams_come_along(tmp_path: Path) -> None:
    """The streams of Python, NumPy and torch, as trainers save them, continue where they were."""
    streams = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save({"rng": streams, "w": torch.ones(2)}, tmp_path / "in.pt")
    drawn = random.random(), np.random.rand(), torch.rand(2)
    assert import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1).kinds["rng"] == "rng"
    w = torch.zeros(2)
    with CheckpointManager(tmp_path / "root", {"w": w}) as manager:
        manager.restore()
    assert_same(drawn, (random.random(), np.random.rand(), torch.rand(2)))


def test_ties_and_values_survive(tmp_path: Path) -> None:
    """Tied tensors are stored once; values keep their types."""
    shared = torch.arange(4.0)
    values = {
        "size": torch.Size([2]),
        "pair": (1, 2.5),
        "big": 2**200,
        "none": None,
        "c": collections.Counter("aab"),
        "s": {1, 2},
        "z": 1j,
        "dtype": torch.bfloat16,
        "raw": b"\x00\xff",
    }
    torch.save({"ties": {"a": shared, "b": shared}, "values": values}, tmp_path / "in.pt")
    import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1)
    repository = Repository(LocalStorage(str(tmp_path / "root")))
    assert repository.manifest(repository.entries()[-1]).nbytes == shared.nbytes
    export_checkpoint(tmp_path / "root", 1, tmp_path / "out.pt", to="torch")
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert out["values"] == values
    assert_same({"a": shared, "b": shared}, out["ties"])


class Bomb:
    """What an attacker pickles."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_bomb_is_refused_by_name_and_not_run(tmp_path: Path, protocol: int) -> None:
    """The global that would be called is named; it is not called; the root does not even come to exist."""
    bomb = {"w": torch.ones(2), "x": Bomb(tmp_path / "ran")}
    torch.save(bomb, tmp_path / "in.pt", pickle_protocol=protocol)
    with pytest.raises(UnsupportedState, match=r"needs posix\.mkdir") as caught:
        import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"path": Path("x")}, "pathlib"),
        ({"array": np.array([object()])}, "dtype"),
        ({"run": Run}, "foreign_states.Run"),
        ({"sparse": torch.eye(2).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_unknown_classes_are_refused_by_name(tmp_path: Path, tree: Any, name: str) -> None:
    """Whatever is not plain data: the message says which class it is."""
    torch.save(tree, tmp_path / "in.pt")
    with pytest.raises((UnsupportedState, FormatError), match=name.replace(".", r"\.")):
        import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1)
    assert not (tmp_path / "root").exists()


HOSTILE = {
    "a call of data": b"\x80\x02}(X\x01\x00\x00\x00a}R.",
    "an attribute is set": b"\x80\x02ctorch\nSize\n}(X\x01\x00\x00\x00aK\x01ub.",
    "an unknown opcode": b"\x80\x02(ios\nsystem\n.",
    "a registered extension": b"\x80\x02\x82\x01.",
    "no end": b"\x80\x02}",
    "a stack that is empty": b"\x80\x02\x85.",
    "a memo that is not there": b"\x80\x02h\x05.",
    "nonsense": b"\xff\xfe",
    "many references": b"\x80\x02]q\x00" + b"".join(b"](" + b"h\x00" * 20 + b"eq\x00" for _ in range(20)) + b".",
    "itself": b"\x80\x02]q\x00h\x00a.",
    "depth": b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles_end_in_our_errors(tmp_path: Path, what: str) -> None:
    """No sequence of opcodes does anything but end, in a moment, in an error that says which file it is."""
    records = {"data.pkl": HOSTILE[what], "version": b"3\n"}
    (tmp_path / "in.pt").write_bytes(zipped(records))
    with pytest.raises((FormatError, UnsupportedState), match=r"in\.pt"):
        import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1)
    assert not (tmp_path / "root").exists()


def test_every_truncation_and_many_flips_are_harmless(tmp_path: Path) -> None:
    """A file that was cut off is refused; one with a flipped byte is refused, or differs in data only."""
    torch.save({"model": {"w": torch.arange(6.0)}, "step": 3}, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    count = 0
    for stop in range(0, len(data), 7):
        (tmp_path / "in.pt").write_bytes(data[:stop])
        with pytest.raises((FormatError, UnsupportedState)):
            import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1)
        count += 1
    assert count > 100
    assert not (tmp_path / "root").exists()
    for position in range(0, len(data), 11):
        changed = bytearray(data)
        changed[position] ^= 0xFF
        (tmp_path / "in.pt").write_bytes(changed)
        with contextlib.suppress(FormatError, UnsupportedState, ValueError):
            import_checkpoint(f"memory://flip-{position}", tmp_path / "in.pt", step=1)


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    """Nothing compressed, no overlap, no storage of another size, no program, no version from the future."""
    torch.save({"w": torch.ones(4)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    for changed, match in [
        (zipped(records, zipfile.ZIP_DEFLATED), "compressed"),
        (zipped({**records, "data/0": bytes(8)}), "storage"),
        (zipped({**records, "version": b"11\n"}), "newer"),
        (zipped({**records, "byteorder": b"big"}), "big-endian"),
        (zipped({**records, "constants.pkl": b""}), "TorchScript"),
        (zipped({name: data for name, data in records.items() if name != "data/0"}), "data/0"),
        (pickle.dumps({"w": 1}), r"torch 1\.6"),
    ]:
        (tmp_path / "in.pt").write_bytes(changed)
        with pytest.raises(FormatError, match=match):
            import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1)
    assert not (tmp_path / "root").exists()


def test_memory_is_bounded_by_the_slots_and_not_by_the_file(tmp_path: Path) -> None:
    """Importing 192 MiB in tensors of 8 MiB takes a third of it at most; exporting them, little more than a batch."""
    program = (
        "import resource, sys, torch, ckptman.convert as c, ckptman.cli._group\n"
        "from ckptman import CheckpointManager\n"
        "root, source, out = sys.argv[1:]\n"
        "c.import_checkpoint('memory://warm', source + '.small', step=1)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "c.import_checkpoint(root, source, step=1)\n"
        "middle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "c.export_checkpoint(root, 1, out, to='torch')\n"
        "print(middle - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    torch.save(
        {f"w{index}": torch.full((2 << 20,), index, dtype=torch.float32) for index in range(24)}, tmp_path / "in"
    )
    torch.save({"w": torch.ones(3)}, tmp_path / "in.small")
    words = [sys.executable, "-c", program, str(tmp_path / "root"), str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    imported, exported = (int(word) >> 10 for word in done.stdout.split())
    assert imported <= 56, f"{imported} MiB"
    assert exported <= 104, f"{exported} MiB"
    assert (tmp_path / "out").stat().st_size > 192 << 20


def test_an_interrupted_import_leaves_nothing(tmp_path: Path) -> None:
    """Whatever stops it between its files and its commit: the step does not exist, and the next import works."""
    torch.save({"model": {"w": torch.zeros(1 << 20)}}, tmp_path / "in.pt")
    torch.save({"model": {"w": torch.zeros(3)}}, tmp_path / "other.pt")
    import_checkpoint(tmp_path / "root", tmp_path / "other.pt", step=1)

    class Stopping(LocalStorage):
        def persist(self, folders: Any) -> None:
            raise StorageError("the disk is gone")

    with pytest.raises(SaveFailed, match="the disk is gone"):
        import_checkpoint(Stopping(str(tmp_path / "root")), tmp_path / "in.pt", step=2)
    assert [one.step for one in CheckpointManager(tmp_path / "root").checkpoints()] == [1]
    assert not list((tmp_path / "root").glob("step-*2.w*"))
    import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=2)
    assert [one.step for one in CheckpointManager(tmp_path / "root").checkpoints()] == [1, 2]


@pytest.mark.parametrize("method", ["open_new", "persist", "create"])
def test_a_killed_import_leaves_nothing_that_counts(tmp_path: Path, method: str) -> None:
    """SIGKILL at the first file, after the last, or at the commit: no step, and the next import sweeps and works."""
    torch.save({"model": {"w": torch.zeros(1 << 18)}}, tmp_path / "in.pt")
    torch.save({"model": {"w": torch.zeros(3)}}, tmp_path / "other.pt")
    root = str(tmp_path / "root")
    import_checkpoint(root, tmp_path / "other.pt", step=1)

    class Killing(LocalStorage):
        """Dies at the call that it is told, if the import has begun to write."""

    def kill(storage: Killing, *arguments: Any) -> Any:
        if method == "create" and not list((tmp_path / "root").glob("step-*2.w*/manifest.json")):
            return getattr(LocalStorage, method)(storage, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(Killing, method, kill)
    child = os.fork()
    if child == 0:
        import_checkpoint(Killing(root), tmp_path / "in.pt", step=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [one.step for one in CheckpointManager(root).checkpoints()] == [1]
    import_checkpoint(root, tmp_path / "in.pt", step=2)
    assert [one.step for one in CheckpointManager(root).checkpoints()] == [1, 2]
    assert len(list((tmp_path / "root").glob("step-*"))) == 2


def test_a_source_that_changes_while_it_is_read_is_not_committed(tmp_path: Path) -> None:
    """A writer that goes on writing the source: refused at the end, and nothing exists."""
    torch.save({"model": {"w": torch.zeros(8)}}, tmp_path / "in.pt")

    class Racing(LocalStorage):
        def open_new(self, key: str) -> Any:
            os.utime(tmp_path / "in.pt", ns=(1, 1))
            return super().open_new(key)

    with pytest.raises(SaveFailed, match="was changed while it was read"):
        import_checkpoint(Racing(str(tmp_path / "root")), tmp_path / "in.pt", step=1)
    assert CheckpointManager(tmp_path / "root").checkpoints() == []


def test_an_import_never_replaces(tmp_path: Path) -> None:
    """A step that exists is refused; so is a component that cannot be called so; and a source without a step."""
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pt")
    import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1)
    with pytest.raises(ValueError, match="has a step 1 already"):
        import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1)
    with pytest.raises(ValueError, match="does not say which step"):
        import_checkpoint(tmp_path / "root", tmp_path / "in.pt")
    torch.save({"my weights": torch.ones(2), "n": 1}, tmp_path / "in.pt")
    with pytest.raises(ValueError, match="my weights"):
        import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=2)


def test_damage_is_found_while_exporting(tmp_path: Path) -> None:
    """One flipped bit in the checkpoint: the export fails, and its place stays empty."""
    torch.save({"w": torch.ones(64)}, tmp_path / "in.pt")
    import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1)
    (file,) = (tmp_path / "root").glob("step-*/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for to in ("torch", "safetensors"):
        with pytest.raises(IntegrityError):
            export_checkpoint(tmp_path / "root", 1, tmp_path / "out", to=to)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.pt", "root"]


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    """A file, a link, or a directory with something in it: refused, and untouched."""
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pt")
    import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for out in ("file", "link", "full"):
        with pytest.raises(StorageError, match="exists already"):
            export_checkpoint(tmp_path / "root", 1, tmp_path / out, to="torch")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_weights_only_would_not_read_is_not_written(tmp_path: Path) -> None:
    """The export of a value that torch's safe loader refuses fails, and says where the value is."""
    with CheckpointManager(tmp_path / "root", {"notes": {"q": collections.deque([1])}, "w": torch.ones(2)}) as manager:
        manager.save(1, block=True)
    with pytest.raises(UnsupportedState, match=r"\['notes'\]\['q'\] is a deque"):
        export_checkpoint(tmp_path / "root", 1, tmp_path / "out.pt", to="torch", components=["notes"])
    export_checkpoint(tmp_path / "root", 1, tmp_path / "out.pt", to="torch", components=["w"])
    assert_same(torch.load(tmp_path / "out.pt", weights_only=True), {"w": torch.ones(2)})
