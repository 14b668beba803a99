"""How much tensors changed between two checkpoints of one root: block by block, every byte checked on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ckptman.format.digest import blocks
from ckptman.format.manifest import Chunk, Manifest, Tensor, box_of
from ckptman.pipeline.reading import fill
from ckptman.repository.reading import CheckedReader, Part
from ckptman.state.tensors import as_bytes, dtype_of
from ckptman.storage.base import Storage

_MAX_ITEMSIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChange:
    """
    How much one tensor changed.

    Attributes:
        name: The tensor.
        max_abs: The largest absolute change of an element; NaN where one became NaN or ceased to be. None for types
            that have no numbers to subtract (bits, sub-byte integers): all that is known is that bytes differ.
        relative: The Euclidean norm of the change divided by that of the old tensor's finite elements (infinite
            where that is 0). None as above.
    """

    name: str
    max_abs: float | None
    relative: float | None


def compare(storage: Storage, a: Manifest, b: Manifest, names: Sequence[str]) -> Iterator[TensorChange]:
    """
    Measure the change from *a* to *b* of the tensors *names*, which have equal shapes and dtypes in both.

    Computed in float64 (complex128), in which integers beyond 2**53 are not exact. Takes a few blocks of 8 MiB of
    memory at a time; where the two are cut into chunks or blocks differently, both whole tensors.

    Raises:
        IntegrityError: A checkpoint is damaged.
        StorageError: The medium failed.
    """
    for name in names:
        old, new = _tensor(a, name), _tensor(b, name)
        if _has_numbers(old.dtype):
            yield _measured(name, _pairs(storage, (a, old), (b, new)), dtype_of(old.dtype))
        else:
            yield TensorChange(name=name, max_abs=None, relative=None)


def _tensor(manifest: Manifest, name: str) -> Tensor:
    stored = manifest.aliases.get(name, name)
    return next(tensor for tensor in manifest.tensors if tensor.name == stored)


def _has_numbers(dtype: str) -> bool:
    is_sub_byte = dtype.removeprefix("u").startswith("int") and dtype[-1] in "1234567" and dtype[-2] == "t"
    return not (is_sub_byte or dtype.startswith(("bits", "float4")))


def _measured(name: str, pairs: Iterator[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> TensorChange:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    largest, change_squared, old_squared = 0.0, 0.0, 0.0
    for old_bytes, new_bytes in pairs:
        old, new = (one.view(dtype).to(wide) for one in (old_bytes, new_bytes))
        is_same = (old == new) | (old.isnan() & new.isnan())
        change = torch.where(is_same, 0, new - old).abs()
        block_largest = change.max().item() if change.numel() else 0.0
        largest = block_largest if math.isnan(block_largest) else max(largest, block_largest)  # NaN stays: see below
        change_squared += change.square().sum().item()
        old_squared += old[old.isfinite()].abs().square().sum().item()
        if math.isnan(largest):
            return TensorChange(name=name, max_abs=math.nan, relative=math.nan)
    change_norm, old_norm = math.sqrt(change_squared), math.sqrt(old_squared)
    relative = 0.0 if change_norm == 0 else change_norm / old_norm if old_norm else math.inf
    return TensorChange(name=name, max_abs=largest, relative=relative)


def _pairs(
    storage: Storage, a: tuple[Manifest, Tensor], b: tuple[Manifest, Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The bytes of both tensors, piece by corresponding piece."""
    (old, old_tensor), (new, new_tensor) = a, b
    if not _are_cut_alike(a, b):
        yield _whole(storage, *a), _whole(storage, *b)
        return
    readers = CheckedReader(storage, old), CheckedReader(storage, new)
    for old_chunk, new_chunk in zip(_sorted(old_tensor), _sorted(new_tensor), strict=True):
        for index, (start, stop) in enumerate(blocks(old_chunk.nbytes, old.block_nbytes)):
            old_part = _block(old_tensor, old_chunk, index, start=start, stop=stop)
            new_part = _block(new_tensor, new_chunk, index, start=start, stop=stop)
            yield _read(readers[0], old, old_part), _read(readers[1], new, new_part)


def _are_cut_alike(a: tuple[Manifest, Tensor], b: tuple[Manifest, Tensor]) -> bool:
    boxes = [[box_of(chunk, tensor) for chunk in _sorted(tensor)] for _, tensor in (a, b)]
    block_nbytes = a[0].block_nbytes
    return boxes[0] == boxes[1] and block_nbytes == b[0].block_nbytes and block_nbytes % _MAX_ITEMSIZE == 0


def _sorted(tensor: Tensor) -> list[Chunk]:
    return sorted((chunk for chunk in tensor.chunks if chunk.nbytes), key=lambda chunk: box_of(chunk, tensor))


def _block(tensor: Tensor, chunk: Chunk, index: int, *, start: int, stop: int) -> Part:
    """Block *index* of *chunk* as a chunk of its own: its digest is its own, so the reader checks it by itself."""
    own = Chunk(
        file=chunk.file, start=chunk.start + start, nbytes=stop - start, digests=chunk.digests[index : index + 1]
    )
    return Part(tensor=tensor, chunk=own)


def _read(reader: CheckedReader, manifest: Manifest, part: Part) -> torch.Tensor:
    data = torch.empty(part.chunk.nbytes, dtype=torch.uint8)
    for _ in reader.chunks(manifest.files[part.chunk.file], [part], lambda tensor, chunk: as_bytes(data)):
        pass
    return data


def _whole(storage: Storage, manifest: Manifest, tensor: Tensor) -> torch.Tensor:
    data = torch.empty(tensor.shape, dtype=dtype_of(tensor.dtype))
    fill(storage, manifest, {tensor.name: data})
    return data.reshape(-1).view(torch.uint8)
