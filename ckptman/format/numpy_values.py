"""
NumPy's part of the typed values: scalars, small arrays and dtypes as JSON trees, and back.

A dtype from a file is never looked up by name: only the spellings of `_DTYPE` reach ``np.dtype``.
"""

from __future__ import annotations

import math
import re

import numpy as np

from ckptman.errors import FormatError
from ckptman.format.strict_json import from_base64, to_base64

MAX_INLINE_NBYTES = 4096
"""Arrays of more bytes (or elements) are stored as tensors, never inline."""

# no objects, no records, no long double (its bytes mean something else on every platform)
_DTYPE = re.compile(r"\|b1|\|[iu]1|[<>](?:[iu][248]|f[248]|c8|c16|[mM]8(?:\[\w{1,20}\])?|U\d{1,9})|\|S\d{1,9}")


def numpy_tree(value: object) -> dict[str, object] | None:
    """*value* as a JSON tree if it is a NumPy scalar, small array or dtype that the format can hold, else None."""
    if isinstance(value, np.dtype):
        return {"$": "numpy.dtype", "v": value.str} if _holds(value) else None
    if isinstance(value, np.generic):
        if not _holds(value.dtype) or type(value) is not value.dtype.type:
            return None
        return {"$": "numpy", "dtype": value.dtype.str, "v": to_base64(_scalar_bytes(value))}
    if type(value) is np.ndarray and is_inline(value):
        return {
            "$": "numpy.array",
            "dtype": value.dtype.str,
            "shape": list(value.shape),
            "v": to_base64(value.tobytes()),
        }
    return None


def is_inline(array: np.ndarray) -> bool:
    """Whether *array* is small and plain enough to be kept in the typed values themselves."""
    return _holds(array.dtype) and array.nbytes <= MAX_INLINE_NBYTES and array.size <= MAX_INLINE_NBYTES


def read_dtype(text: object) -> np.dtype:
    """The dtype that *text* spells. Raises FormatError for any spelling but the format's own."""
    if type(text) is not str or not _DTYPE.fullmatch(text):
        raise FormatError(f"{text!r:.80} is not a NumPy dtype that the format knows")
    try:
        dtype = np.dtype(text)
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{text!r:.80} is not a NumPy dtype that NumPy knows: {error}") from error
    if dtype.str != text:
        raise FormatError(f"the NumPy dtype {text!r:.80} must be spelled {dtype.str!r}")
    return dtype


def read_scalar(v: object, dtype: object) -> np.generic:
    """The scalar of *dtype* whose bytes are *v* in base64. Raises FormatError."""
    kind, data = read_dtype(dtype), from_base64(v)
    if len(data) != kind.itemsize:
        raise FormatError(f"a NumPy scalar of {kind.str} has {len(data)} bytes instead of {kind.itemsize}")
    if kind.kind == "S":
        return np.bytes_(data)
    if kind.kind == "U":
        return np.str_(_text(data, kind))
    scalar: np.generic = np.frombuffer(data, kind)[0]
    return scalar


def read_array(v: object, dtype: object, shape: object) -> np.ndarray:
    """The writable array of *dtype* and *shape* whose bytes in C order are *v* in base64. Raises FormatError."""
    kind, data = read_dtype(dtype), from_base64(v)
    if type(shape) is not list or any(type(size) is not int or size < 0 for size in shape):
        raise FormatError(f"{shape!r:.80} is not the shape of an array")
    size = math.prod(shape)
    if size > MAX_INLINE_NBYTES or size * kind.itemsize > MAX_INLINE_NBYTES or len(data) != size * kind.itemsize:
        raise FormatError(f"an array of {kind.str} with shape {shape!r:.80} cannot have {len(data)} bytes")
    try:
        return np.ndarray(tuple(shape), kind, bytearray(data))
    except (TypeError, ValueError, OverflowError, MemoryError) as error:
        raise FormatError(f"NumPy refuses an array of {kind.str} with shape {shape!r:.80}: {error}") from error


def _holds(dtype: np.dtype) -> bool:
    return _DTYPE.fullmatch(dtype.str) is not None


def _scalar_bytes(value: np.generic) -> bytes:
    # an array of the empty text has room for one character, so these two kinds do not go through an array
    if isinstance(value, np.bytes_):
        return bytes(value)
    if isinstance(value, np.str_):
        return value.encode(_utf32(value.dtype), "surrogatepass")
    return np.asarray(value).tobytes()


def _text(data: bytes, kind: np.dtype) -> str:
    try:
        return data.decode(_utf32(kind), "surrogatepass")
    except UnicodeDecodeError as error:
        raise FormatError(f"the text of a NumPy {kind.str} is not UTF-32: {error}") from error


def _utf32(kind: np.dtype) -> str:
    return "utf-32-be" if kind.str[0] == ">" else "utf-32-le"
