"""docs/reference/format.md is true: its example, its examples of values, its tables, and its reader."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

import ckptman
from ckptman.format.catalog import MAX_RECORD_NBYTES, read_record, write_record
from ckptman.format.digest import block_digest, digests, sha256
from ckptman.format.dtypes import DTYPES
from ckptman.format.manifest import (
    MAX_HEADER_NBYTES,
    MAX_MANIFEST_NBYTES,
    MAX_NDIM,
    Chunk,
    Manifest,
    Tensor,
    read_manifest,
    write_manifest,
)
from ckptman.format.names import MAX_METRICS, manifest_key
from ckptman.format.safetensors_layout import Wanted, check_header, lay_out
from ckptman.format.sealed import Torn
from ckptman.format.tiling import MAX_SPLIT_NDIM
from ckptman.format.value_tags import FIELDS
from ckptman.format.values import Marker, from_json, to_json

REFERENCE = (Path(__file__).parents[3] / "docs" / "reference" / "format.md").read_text("utf-8")
(READER,) = re.findall(r"```python\n(.*?)```", REFERENCE, re.DOTALL)
ATTEMPT = "step-000000000002.w0001.0a1b2c3d"


def held(manifest: Manifest) -> list[tuple[Tensor, Chunk]]:
    """The chunks of a manifest with one file."""
    return [(tensor, chunk) for tensor in manifest.tensors for chunk in tensor.chunks]


def example() -> dict[str, bytes]:
    """The files of the complete root, from the text alone."""
    section = REFERENCE.partition("## A complete root")[2].partition("## A complete reader")[0]
    files = {}
    for key, says, kind, block in re.findall(r"`([^`\n]+)`([^\n]*):\n\n```(\w+)\n(.*?)```", section, re.DOTALL):
        if kind == "json":
            files[key] = block.removesuffix("\n" if "without a newline" in says else "").encode()
        else:
            lines = [line.split("  ") for line in block.splitlines()]
            files[key] = b"".join(bytes.fromhex(line[1]) for line in lines)
            assert [int(line[0], 16) for line in lines] == list(range(0, len(files[key]), 32))
    return files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for key, data in example().items():
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path


def read_with_the_reader(root: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Run the documented program, which knows nothing of ckptman."""
    assert "ckptman" not in READER
    names: dict[str, object] = {"root": str(root)}
    exec(compile(READER, "docs/reference/format.md", "exec"), names)
    return names["manifest"], names["tensors"]  # type: ignore[return-value]


def test_the_example_is_what_we_write() -> None:
    """Our readers accept every byte of it, and our writers make the same bytes again."""
    files = example()
    assert sorted(files) == [
        "catalog/000000000001.json",
        "catalog/000000000002.json",
        "ckptman.json",
        f"{ATTEMPT}/manifest.json",
        f"{ATTEMPT}/model.safetensors",
    ]
    first, second = (read_record(files[f"catalog/00000000000{n}.json"], n) for n in (1, 2))
    assert [write_record(record) for record in (first, second)] == [
        files["catalog/000000000001.json"],
        files["catalog/000000000002.json"],
    ]
    assert (first.previous, second.previous) == (None, sha256(files["catalog/000000000001.json"]))
    (entry,) = second.checkpoints
    data = files[manifest_key(entry.attempt)]
    manifest = read_manifest(data, entry.attempt)
    assert (write_manifest(manifest), entry.manifest) == (data, sha256(data))
    assert manifest.root == second.root == json.loads(files["ckptman.json"])["id"]
    (file,) = manifest.files
    data = files[file.path]
    assert len(data) == file.nbytes
    assert check_header(data[: 8 + file.header_nbytes], file, held(manifest), manifest) == []
    for tensor in manifest.tensors:
        (chunk,) = tensor.chunks
        assert chunk.digests == digests(data[chunk.start : chunk.start + chunk.nbytes])


def test_the_manager_restores_the_example(root: Path) -> None:
    """The whole product reads what the text alone defines."""
    with ckptman.CheckpointManager(root) as manager:
        (found,) = manager.checkpoints()
    assert (found.step, found.tags, dict(found.metrics)) == (2, ("first",), {"loss": 0.25})


def test_the_reader_reads_the_example(root: Path) -> None:
    """Values, ties, and types that NumPy has."""
    _, tensors = read_with_the_reader(root)
    assert tensors.keys() == {"model/weight", "model/phase", "model/head.weight"}
    assert tensors["model/weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert tensors["model/head.weight"] is tensors["model/weight"]
    assert (tensors["model/phase"].dtype.name, tensors["model/phase"].tolist()) == ("complex64", [0.5 - 1j])


def test_the_reader_reads_what_the_manager_writes(tmp_path: Path) -> None:
    """A real root, with every shape that is special and types of every kind, after several saves."""
    state = {
        "a": {
            "zero": torch.zeros(0, 3),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
            "half": torch.arange(5, dtype=torch.bfloat16),
            "eight": torch.arange(5).to(torch.float8_e5m2),
            "imaginary": torch.randn(3, dtype=torch.complex128, generator=torch.Generator().manual_seed(1)),
            "large": torch.arange(3_000_000, dtype=torch.int64),
            "bits": torch.tensor([True, False]),
            "__metadata__": torch.ones(2),
        },
        "b": torch.arange(6).reshape(2, 3).t(),
    }
    with ckptman.CheckpointManager(tmp_path, state, rng=False) as manager:
        for step in (1, 2):
            manager.save(step, block=True)
    manifest, tensors = read_with_the_reader(tmp_path)
    assert manifest["step"] == 2
    inner: dict[str, torch.Tensor] = state["a"]  # type: ignore[assignment]
    for name, tensor in inner.items():
        (found,) = [array for key, array in tensors.items() if key.startswith("a/") and name in key]
        assert found.shape == tuple(tensor.shape)
        assert found.tobytes() == (
            tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() and tensor.ndim else tensor.numpy().tobytes()
        )
    (found,) = [array for key, array in tensors.items() if key.startswith("b/")]
    assert found.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_the_reader_reads_boxes(root: Path) -> None:
    """A tensor in two chunks, cut along its second dimension, is put together."""
    files = example()
    manifest = read_manifest(files[f"{ATTEMPT}/manifest.json"], ATTEMPT)
    weight = manifest.tensors[1]
    (chunk,) = weight.chunks
    data = files[f"{ATTEMPT}/model.safetensors"]
    halves = tuple(
        Chunk(
            file=0,
            start=chunk.start + 8 * column,
            nbytes=8,
            digests=digests(data[chunk.start + 8 * column : chunk.start + 8 * column + 8]),
            offset=(0, column),
            shape=(2, 1),
            key=f"w{column}",
        )
        for column in (0, 1)
    )
    header = data[: 8 + manifest.files[0].header_nbytes]
    tree = json.loads(header[8:])
    spans = {"w0": [8, 16], "w1": [16, 24]}
    del tree["weight"], tree["__metadata__"]
    tree |= {key: {"dtype": "F32", "shape": [2, 1], "data_offsets": span} for key, span in spans.items()}
    header = header[:8] + json.dumps(tree, separators=(",", ":")).encode().ljust(len(header) - 8)
    changed = replace(
        manifest,
        files=(replace(manifest.files[0], header_digest=block_digest(header)),),
        tensors=(manifest.tensors[0], Tensor(name=weight.name, dtype=weight.dtype, shape=weight.shape, chunks=halves)),
    )
    assert check_header(header, changed.files[0], held(changed), changed) == []
    written = write_manifest(changed)
    (root / ATTEMPT / "manifest.json").write_bytes(written)
    (root / ATTEMPT / "model.safetensors").write_bytes(header + data[len(header) :])
    record = read_record(files["catalog/000000000002.json"], 2)
    entry = replace(record.checkpoints[0], manifest=sha256(written))
    (root / "catalog" / "000000000003.json").write_bytes(write_record(replace(record, number=3, checkpoints=(entry,))))
    assert read_with_the_reader(root)[1]["model/weight"].tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_the_reader_reads_pieces(root: Path) -> None:
    """The same tensor in two files, as two ranks write it: the manifest has it in many pieces."""
    files = example()
    manifest = read_manifest(files[f"{ATTEMPT}/manifest.json"], ATTEMPT)
    _, weight = manifest.tensors
    listed, chunks = list(manifest.files), []
    for rank, rows in enumerate(([1.0, 2.0], [3.0, 4.0])):
        layout = lay_out([Wanted(name="weight", dtype="float32", shape=(1, 2))])
        raw = np.array(rows, "float32").tobytes()
        file = layout.file(f"{ATTEMPT}/part{rank}.safetensors")
        (root / file.path).write_bytes(layout.header + raw)
        listed.append(file)
        place = {"file": rank + 1, "start": layout.tensors[0].start, "offset": (rank, 0), "shape": (1, 2)}
        chunks.append(Chunk(nbytes=8, digests=digests(raw), **place))
    changed = replace(
        manifest, files=tuple(listed), tensors=(manifest.tensors[0], replace(weight, chunks=tuple(chunks)))
    )
    written = write_manifest(changed)
    assert list(json.loads(written)["body"]["sharded"]) == ["tensors", "cuts", "layouts", "files"]
    (root / ATTEMPT / "manifest.json").write_bytes(written)
    record = read_record(files["catalog/000000000002.json"], 2)
    entry = replace(record.checkpoints[0], manifest=sha256(written))
    (root / "catalog" / "000000000003.json").write_bytes(write_record(replace(record, number=3, checkpoints=(entry,))))
    assert read_with_the_reader(root)[1]["model/weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    (root / ATTEMPT / "part1.safetensors").write_bytes(layout.header + raw[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        read_with_the_reader(root)


def test_the_reader_refuses_every_damaged_byte(root: Path) -> None:
    """One bit of each byte of the manifest and the data; nothing is read from either, and nothing is left out."""
    refused = 0
    for key in (f"{ATTEMPT}/manifest.json", f"{ATTEMPT}/model.safetensors"):
        whole = example()[key]
        for at in range(len(whole)):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << at % 8
            (root / key).write_bytes(damaged)
            with pytest.raises(ValueError, match=r"damaged|wrong"):
                read_with_the_reader(root)
            refused += 1
        (root / key).write_bytes(whole)
    assert refused == sum(len(example()[f"{ATTEMPT}/{name}"]) for name in ("manifest.json", "model.safetensors"))
    assert refused > 1300


def test_the_reader_passes_over_a_torn_record(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says so; a newer format stops it instead."""
    newest = example()["catalog/000000000002.json"]
    (root / "catalog" / "000000000003.json").write_bytes(newest[:-1])
    assert len(read_with_the_reader(root)[1]) == 3
    assert "000000000003.json is torn, or was renamed" in capsys.readouterr().out
    body = b'{"format":2}'
    (root / "catalog" / "000000000004.json").write_bytes(b'{"sha256":"%s","body":%s}\n' % (sha256(body).encode(), body))
    with pytest.raises(ValueError, match="newer than this reader"):
        read_with_the_reader(root)


def own_markers(value: object, path: str) -> Marker | None:
    return value if isinstance(value, Marker) else None


def test_the_examples_of_values_are_what_we_write() -> None:
    """Every example of the table is read, and written again as the same bytes."""
    table = REFERENCE.partition("## Typed values")[2].partition("- Base64 is")[0]
    rows = [row.split(" | ")[1] for row in table.splitlines() if row.startswith("|") and "`" in row]
    examples = [text for row in rows for text in re.findall(r"`([^`]+)`", row) if text not in {".", "e", "/", "maxlen"}]
    assert len(examples) >= 32
    for text in examples:
        value = from_json(text.encode())
        assert to_json(value, "x", own_markers).decode() == text


def test_every_tag_is_in_the_table() -> None:
    """The text names all that the code knows, and no more."""
    section = REFERENCE.partition("## Typed values")[2].partition("## Versions")[0]
    assert set(re.findall(r'\{"\$":"([^"]+)"', section)) == set(FIELDS)


def test_every_dtype_is_in_the_table() -> None:
    """Names, item sizes and safetensors' names."""
    section = REFERENCE.partition("### Dtypes")[2].partition("*Raw*")[0]
    section = section.replace(
        "`int1` … `int7`, `uint1` … `uint7`", " ".join(f"`{s}int{n}`" for s in ("", "u") for n in range(1, 8))
    )
    found = {}
    for row in section.splitlines():
        if row.startswith("| `"):
            names, sizes, native = (cell.split() for cell in row.strip("| ").split(" | "))
            sizes = sizes[:1] * len(names) if "each" in sizes else sizes
            native = native * len(names) if native == ["raw"] else native
            for name, size, safetensors in zip(names, sizes, native, strict=True):
                found[name.strip("`")] = (int(size), None if safetensors == "raw" else safetensors.strip("`"))
    assert found == {name: (dtype.itemsize, dtype.safetensors) for name, dtype in DTYPES.items()}


def test_the_limits_are_those_of_the_code() -> None:
    """The table of limits."""
    limits = REFERENCE.partition("## Limits")[2].partition("## A complete root")[0]
    assert f"| {MAX_RECORD_NBYTES >> 20} MiB |" in limits
    assert f"| {MAX_MANIFEST_NBYTES >> 30} GiB |" in limits
    assert f"| {MAX_HEADER_NBYTES:,} bytes |" in limits
    assert f"| {MAX_METRICS} |" in limits
    assert f"| {MAX_NDIM}, cut along {MAX_SPLIT_NDIM} |" in limits


def test_the_example_depends_on_its_number() -> None:
    """A record under another number counts as torn, as the text says."""
    with pytest.raises(Torn, match="renamed"):
        read_record(example()["catalog/000000000002.json"], 3)
