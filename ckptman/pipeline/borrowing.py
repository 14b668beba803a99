"""
Borrowing: a tensor that is as it was in an earlier checkpoint is pointed at, not written again.

1. After a commit, and after a whole restore, this checkpoint is what may be lent from: its bytes were written or
   verified by this process. Never merely "the newest": a restore that passed over a damaged newest checkpoint would
   otherwise have its next save point at the damage.
2. A later save hashes the live bytes of those tensors that it has a reason to expect unchanged, before anything is
   staged. Those whose digests are equal are borrowed; nothing else ever is. No flag is believed: the version counter of
   a tensor does not move with every change.
3. The reasons: no optimizer of the state owns the tensor, or its digests were equal in the last two checkpoints. One
   that was expected unchanged and had changed is expected to change until two digests are equal again. Of a component
   of very many tensors a few are hashed first: where all of these have changed, the others are not looked up.
4. A file is borrowed only where that saves at least half of it, and 1 MiB. Otherwise one small tensor would keep a
   whole old file on the disk: what is needed of it is written anew, and the file goes with its last checkpoint.
5. The commit refuses a checkpoint that borrows a file which the record that it is built on does not need
   (repository/changes.py), so a lender that was deleted meanwhile costs a save and never a checkpoint.
"""

from __future__ import annotations

import ctypes
import functools
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from ckptman.format.digest import block_digest, blocks
from ckptman.format.manifest import Chunk, File, Manifest, ManyChunks, Tensor, box_of
from ckptman.pipeline.cycles import no_search_for_cycles
from ckptman.state.capture import Captured, Leaf
from ckptman.state.tensors import as_bytes, dtype_name, overwrite

WORTHWHILE_SHARE = 0.5
"""The part of a file's data that must be borrowed for any of it to be."""

WORTHWHILE_NBYTES = 1 << 20
"""And how many bytes. Fewer cost less to write than to depend on another attempt's folder for."""

_TINY_NBYTES = 4096

_MANY = 1024
"""Tensors of a component, from which on it pays to hash a few of them first."""

_FEW = 32
"""Were half of the bytes unchanged, all of so few bytes drawn at random would have changed once in 2**32 saves."""

Key = tuple[str, tuple[int, ...] | None]
"""A leaf, or a stored chunk: the name of its tensor, and where in that it begins (None: it is the whole)."""


_Pair = tuple[Leaf, Tensor]
"""A leaf and what is stored of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Borrowed:
    """
    Leaves of a save that lie in files of other attempts.

    Each of *tensors* has one chunk, whose number of a file counts within *files*.
    """

    files: tuple[File, ...] = ()
    tensors: tuple[Tensor, ...] = ()

    @property
    def keys(self) -> frozenset[Key]:
        """Of the leaves."""
        return frozenset(map(_key, self.tensors))

    def behind(self, count: int) -> list[Tensor]:
        """The tensors, for a manifest that lists *count* files of its own before these."""
        return [_moved(tensor, lambda file: file + count) for tensor in self.tensors]


class _Lender:
    """
    A checkpoint whose bytes are known to be right, and what was found out about its tensors.

    Attributes:
        manifest: Of the checkpoint.
        listed: Those of its tensors that may be lent.
        steady: What was equal in the last two checkpoints.
        lively: What was expected unchanged once, and had changed.
    """

    def __init__(self, manifest: Manifest, listed: Sequence[Tensor]) -> None:
        self.manifest = manifest
        self.listed = listed
        self.steady: set[Key] = set()
        self.lively: set[Key] = set()

    @functools.cached_property
    def tensors(self) -> _ByChunk:
        """Each is a chunk: a tensor as if it had no other."""
        return _ByChunk(self.listed)

    def enough_of(self, file: int) -> float:
        """How many bytes of it must be borrowed for any to be."""
        known = self.manifest.files[file]
        return max(WORTHWHILE_NBYTES, WORTHWHILE_SHARE * (known.nbytes - known.header_nbytes))

    def may_lend(self) -> bool:
        """Whether there is a file of which enough may be unchanged. Asked before anything is asked of each tensor."""
        left = [0] * len(self.manifest.files)
        for tensor in self.listed:
            if not isinstance(tensor.chunks, tuple):
                return True  # `ManyChunks`: too many to ask
            for chunk in tensor.chunks:
                if (tensor.name, chunk.offset) not in self.lively:
                    left[chunk.file] += chunk.nbytes
        return any(nbytes >= self.enough_of(file) for file, nbytes in enumerate(left))


class Borrowing:
    """What the next save may point at. Used by one thread at a time."""

    def __init__(self) -> None:
        self._lender: _Lender | None = None

    @property
    def has_lender(self) -> bool:
        """Whether there is anything to borrow from."""
        return self._lender is not None

    @no_search_for_cycles()
    def saved(self, manifest: Manifest) -> None:
        """*manifest* was committed by us."""
        before = self._lender
        lender = _Lender(manifest, manifest.tensors)
        if before is not None:
            lender.steady = _steady(before.listed, lender.listed)
            lender.lively = before.lively - lender.steady
        self._lender = lender

    @no_search_for_cycles()
    def restored(self, manifest: Manifest, names: Collection[str]) -> None:
        """The tensors *names* of *manifest* were read, and every byte of them was right."""
        self._lender = _Lender(manifest, [tensor for tensor in manifest.tensors if tensor.name in names])

    def find(
        self, captured: Mapping[str, Captured], *, trained: Collection[int], attempts: Collection[str]
    ) -> Borrowed:
        """
        Hash what is expected to be unchanged; return what is.

        Args:
            captured: The state.
            trained: Addresses of the tensors that optimizers own.
            attempts: Those that the catalog lists. Nothing is borrowed from a lender that is not among them.
        """
        lender = self._lender
        if lender is None or lender.manifest.attempt not in attempts:
            return Borrowed()
        parts = [
            [leaf for leaf in part.leaves if leaf.tensor.data_ptr() not in trained or key_of(leaf) in lender.steady]
            for part in captured.values()
        ]
        leaves = [leaf for part in parts if not _have_changed(part, lender) for leaf in part]
        if sum(leaf.tensor.nbytes for leaf in leaves) < WORTHWHILE_NBYTES or not lender.may_lend():
            return Borrowed()
        expected = [
            (leaf, stored)
            for leaf in leaves
            if (stored := _expected(leaf, lender, trained)) is not None and _agrees(leaf, stored)
        ]
        return _borrow(lender, _unchanged(expected, lender))


def key_of(leaf: Leaf) -> Key:
    """What *leaf* is borrowed under."""
    return leaf.name, leaf.offset


def _key(tensor: Tensor) -> Key:
    return tensor.name, tensor.chunks[0].offset


class _ByChunk:
    """Chunks as tensors of their own. Of tensors in many pieces, most of which others hold, only those asked for."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.known: dict[Key, Tensor] = {}
        self._sharded: dict[str, tuple[Tensor, ManyChunks]] = {}
        for tensor in tensors:
            if isinstance(tensor.chunks, ManyChunks):
                self._sharded[tensor.name] = tensor, tensor.chunks
            elif len(tensor.chunks) == 1:
                self.known[_key(tensor)] = tensor
            else:
                self.known |= {(tensor.name, chunk.offset): _only(tensor, chunk) for chunk in tensor.chunks}

    def __contains__(self, key: Key) -> bool:
        return key in self.known or self._find(key)

    def __getitem__(self, key: Key) -> Tensor:
        if key not in self:
            raise KeyError(key)
        return self.known[key]

    def get(self, key: Key) -> Tensor | None:
        return self.known[key] if key in self else None

    def _find(self, key: Key) -> bool:
        name, offset = key
        if name not in self._sharded or offset is None:
            return False
        tensor, chunks = self._sharded[name]
        chunk = chunks.at(offset)
        if chunk is not None:
            self.known[key] = _only(tensor, chunk)
        return chunk is not None


def _only(tensor: Tensor, chunk: Chunk) -> Tensor:
    return msgspec.structs.replace(tensor, chunks=(chunk,))


def _have_changed(leaves: Sequence[Leaf], lender: _Lender) -> bool:
    """Whether, of very many *leaves*, all of a few have changed. A wrong yes costs writing the others once more."""
    if len(leaves) < _MANY:
        return False
    # a generator of our own: the program's must not notice that it was saved
    few = random.Random(len(leaves)).choices(leaves, [leaf.tensor.nbytes + 1 for leaf in leaves], k=_FEW)
    names = {leaf.name for leaf in few}
    stored = _ByChunk([tensor for tensor in lender.listed if tensor.name in names])
    pairs = [(leaf, tensor) for leaf in few if (tensor := stored.get(key_of(leaf))) is not None]
    block_nbytes = lender.manifest.block_nbytes
    return not any(_agrees(leaf, tensor) and _is_unchanged(leaf.tensor, tensor, block_nbytes) for leaf, tensor in pairs)


def _expected(leaf: Leaf, lender: _Lender, trained: Collection[int]) -> Tensor | None:
    """What is stored of *leaf*, if there is a reason to expect it unchanged."""
    key = key_of(leaf)
    if key in lender.steady or (key not in lender.lively and leaf.tensor.data_ptr() not in trained):
        return lender.tensors.get(key)
    return None


def _agrees(leaf: Leaf, stored: Tensor) -> bool:
    chunk, extent = stored.chunks[0], tuple(leaf.tensor.shape)
    return (
        chunk.nbytes > 0
        and dtype_name(leaf.tensor.dtype) == stored.dtype
        and (extent if leaf.shape is None else leaf.shape) == stored.shape
        and extent == box_of(chunk, stored)[1]
    )


def _unchanged(expected: Iterable[_Pair], lender: _Lender) -> list[Tensor]:
    """The stored tensors of those leaves that are unchanged, of the files that are worth it."""
    by_file: defaultdict[int, list[_Pair]] = defaultdict(list)
    for pair in expected:
        by_file[pair[1].chunks[0].file].append(pair)
    return [tensor for index, found in by_file.items() for tensor in _unchanged_of_file(index, found, lender)]


def _unchanged_of_file(index: int, expected: list[_Pair], lender: _Lender) -> list[Tensor]:
    """Nothing, as soon as so much has changed that the file is not worth it: the rest is not hashed."""
    to_spare = sum(tensor.chunks[0].nbytes for _, tensor in expected) - lender.enough_of(index)
    unchanged = []
    for leaf, tensor in expected:
        if to_spare < 0:
            return []
        if _is_unchanged(leaf.tensor, tensor, lender.manifest.block_nbytes):
            unchanged.append(tensor)
        else:
            lender.lively.add(key_of(leaf))
            to_spare -= tensor.chunks[0].nbytes
    return unchanged if to_spare >= 0 else []


def _is_unchanged(tensor: torch.Tensor, stored: Tensor, block_nbytes: int) -> bool:
    """Whether the live bytes have the stored digests; stops at the first block that has not."""
    digests, nbytes = stored.chunks[0].digests, stored.chunks[0].nbytes
    if not tensor.is_cpu or not tensor.is_contiguous():  # a leaf is strided, and has no bit that negates it
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        overwrite(copy, tensor)
        tensor = copy
    elif nbytes < _TINY_NBYTES:  # a view takes four times as long as the digest; the sizes are known to agree
        return block_digest(memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr()))) == digests[0]
    data = as_bytes(tensor)
    if len(digests) == 1:
        return block_digest(data) == digests[0]
    return all(
        block_digest(data[start:stop]) == digest
        for digest, (start, stop) in zip(digests, blocks(len(data), block_nbytes), strict=True)
    )


def _steady(old: Sequence[Tensor], new: Sequence[Tensor]) -> set[Key]:
    """Those chunks of *new* that are in *old* with the same bytes."""
    names = [tensor.name for tensor in new]
    if [tensor.name for tensor in old] == names and {len(tensor.chunks) for tensor in (*old, *new)} <= {1}:
        pairs = zip(old, new, strict=True)  # as most saves are: then no table of them is needed
        equal = [(one, other) for one, other in pairs if one.chunks[0].digests == other.chunks[0].digests]
        return {_key(other) for one, other in equal if _key(one) == _key(other) and _same_bytes(one, other)}
    before = _ByChunk(old)
    return {key for key, tensor in _ByChunk(new).known.items() if key in before and _same_bytes(before[key], tensor)}


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Of two stored chunks. Digests first: where tensors change, that settles it."""
    return one.chunks[0].digests == other.chunks[0].digests and one.dtype == other.dtype and one.shape == other.shape


def _borrow(lender: _Lender, tensors: list[Tensor]) -> Borrowed:
    numbers = sorted({tensor.chunks[0].file for tensor in tensors})
    place = {number: index for index, number in enumerate(numbers)}
    return Borrowed(
        files=tuple(lender.manifest.files[number] for number in numbers),
        tensors=tuple(_moved(tensor, place.__getitem__) for tensor in tensors),
    )


def _moved(tensor: Tensor, file_of: Callable[[int], int]) -> Tensor:
    return msgspec.structs.replace(
        tensor,
        chunks=tuple(msgspec.structs.replace(chunk, file=file_of(chunk.file)) for chunk in tensor.chunks),
    )
