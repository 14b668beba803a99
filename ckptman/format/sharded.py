"""
Tensors in many pieces, as a manifest lists them: the part of it that grows with tensors × ranks.

A sharded state has one chunk for each tensor and rank, and nearly everything about these repeats: all tensors of one
shape are cut alike, all ranks' files are laid out alike. So each way of cutting is written once, and so is each layout;
what is left for each chunk is its digest. The rules are in docs/reference/format.md; what becomes of it in memory is in
`ckptman.format.columns`.
"""

from __future__ import annotations

import msgspec

from ckptman.format.fields import Count


class ShardedTensor(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, gc=False):
    """A tensor in many pieces. ``cut`` is the number of the way in which it is cut."""

    name: str
    dtype: str
    shape: tuple[Count, ...]
    cut: Count


class Cut(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, gc=False):
    """One way of cutting: the boxes of the pieces, in the order in which the files hold them."""

    offsets: tuple[tuple[Count, ...], ...]
    shapes: tuple[tuple[Count, ...], ...]


class FileLayout(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, gc=False):
    """Of which tensors a file holds pieces, by their numbers, and where each begins, in the order of the bytes."""

    tensors: tuple[Count, ...]
    starts: tuple[Count, ...]


class ShardFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, gc=False):
    """File number ``file``, laid out as number ``layout``; ``digests`` of all its pieces' blocks, as base64."""

    file: Count
    layout: Count
    digests: str


class Sharded(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, gc=False):
    """All tensors of a checkpoint that are in many pieces. ``files`` ascend."""

    tensors: tuple[ShardedTensor, ...]
    cuts: tuple[Cut, ...]
    layouts: tuple[FileLayout, ...]
    files: tuple[ShardFile, ...]
