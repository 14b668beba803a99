"""The table of element types agrees with torch's."""

from __future__ import annotations

import torch

from ckptman.format.dtypes import DTYPES

REFUSED = {"qint8", "quint8", "qint32", "quint4x2", "quint2x4"}


def test_every_dtype_of_torch_is_known_or_refused() -> None:
    """Names and item sizes are torch's; only legacy quantised types are missing."""
    known = {str(value).partition(".")[2] for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert known - set(DTYPES) <= REFUSED
    common = known & set(DTYPES)
    assert len(common) >= 30
    assert {name: DTYPES[name].itemsize for name in common} == {name: getattr(torch, name).itemsize for name in common}


def test_item_sizes_are_powers_of_two() -> None:
    """Descending item sizes align every tensor in a file only because of this."""
    assert {dtype.itemsize for dtype in DTYPES.values()} == {1, 2, 4, 8, 16}
