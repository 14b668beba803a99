"""
What a restore reads: wanted boxes × stored chunks → bytes. Resharding happens here and nowhere else.

    fits        the chunk lies within a wanted box: all of it is read
    run         of the chunk only a part is wanted, whose bytes lie together in the chunk: only their blocks are read
    bands       the wanted bytes lie apart in the chunk (columns of a matrix): the blocks of the rows are read

Digests are of whole blocks, so a block of which a byte is wanted is read and checked whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptman.format.dtypes import DTYPES
from ckptman.format.manifest import Chunk, ManyChunks, Tensor, box_of
from ckptman.format.tiling import Box
from ckptman.plan.boxes import Band, bands, contiguous, intersect, within


@dataclass(frozen=True, slots=True)
class Need:
    """
    What is needed of one chunk for one wanted box.

    Attributes:
        tensor, chunk: What is stored.
        number: Of the wanted box.
        source: What is needed of the chunk, counted from the chunk's first corner.
        target: Where it goes, counted from the wanted box's first corner.
        is_whole: Whether all of the chunk is needed for this box.
    """

    tensor: Tensor
    chunk: Chunk
    number: int
    source: Box
    target: Box
    is_whole: bool

    @property
    def extent(self) -> tuple[int, ...]:
        """The shape of the chunk."""
        return self.tensor.shape if self.chunk.shape is None else self.chunk.shape

    def run(self) -> tuple[int, int] | None:
        """The (start, stop) of the needed bytes within the chunk; None where others lie between them."""
        found = contiguous(self.source, self.extent)
        itemsize = DTYPES[self.tensor.dtype].itemsize
        return None if found is None else (found[0] * itemsize, found[1] * itemsize)

    def bands(self, most_nbytes: int) -> Iterator[Band]:
        """The needed elements as bands of rows of *most_nbytes* or fewer; the chunk has a dimension."""
        return bands(self.source, self.extent, most_nbytes // DTYPES[self.tensor.dtype].itemsize)


def needs(tensor: Tensor, wanted: Sequence[Box]) -> list[Need]:
    """
    What is to be read of *tensor* to fill the boxes *wanted*, each a part of it. Chunks without bytes need no reading.

    *Not* checked: whether the chunks cover the boxes; the manifest's own rules say that they cover the tensor.
    """
    found = []
    chunks = tensor.chunks
    for chunk in chunks.touching(wanted) if isinstance(chunks, ManyChunks) else chunks:
        if not chunk.nbytes:
            continue
        stored = box_of(chunk, tensor)
        for number, box in enumerate(wanted):
            if shared := intersect(stored, box):
                is_whole = math.prod(shared[1]) == math.prod(stored[1])
                found.append(Need(tensor, chunk, number, within(shared, stored), within(shared, box), is_whole))
    return found
