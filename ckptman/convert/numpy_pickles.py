"""NumPy's arrays, scalars and dtypes as they lie in pickles: made of their bytes, without NumPy's own constructors."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ckptman.convert.unpickling import Make

_CODE = re.compile(r"b1|[iu][1248]|f[248]|c8|c16")


class _Dtype:
    """A dtype whose byte order follows."""

    __slots__ = ("code", "keys")

    def __init__(self, code: str) -> None:
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise ValueError(f"the NumPy dtype {code!r:.40} is not one of plain numbers")
        self.code = code
        self.keys: list[int] = []

    def built(self, state: Any) -> np.dtype[Any]:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError("a NumPy dtype has an unknown byte order")
        return np.dtype(self.code).newbyteorder(order)


class _Array:
    """An array whose contents follow."""

    __slots__ = ("keys",)

    def __init__(self) -> None:
        self.keys: list[int] = []

    def built(self, state: Any) -> np.ndarray:
        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, np.dtype) or type(data) is not bytes or type(shape) is not tuple:
            raise ValueError("a NumPy array is not made of numbers")
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
        return array.copy(order="K")


def _scalar(dtype: Any, data: Any) -> object:
    if not isinstance(dtype, np.dtype) or type(data) is not bytes or len(data) != dtype.itemsize:
        raise ValueError("a NumPy scalar is not a number")
    return np.frombuffer(data, dtype)[0]


TABLE: dict[str, object] = {
    "numpy.ndarray": "ndarray",
    "numpy.dtype": Make(lambda code, *_: _Dtype(code)),
    **{f"numpy.{core}.multiarray._reconstruct": Make(lambda *_: _Array()) for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": Make(_scalar) for core in ("core", "_core")},
}
"""For `read_pickle`."""
