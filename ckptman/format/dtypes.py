"""
Every element type that a tensor may have: its torch name, the bytes of one element, and how safetensors calls it.

Types that safetensors (0.8) cannot hold, or cannot load again, are stored there as their raw bytes (``U8``);
the manifest always has the true name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dtype:
    """``itemsize`` in bytes; ``safetensors`` is None where the file holds raw bytes."""

    itemsize: int
    safetensors: str | None


DTYPES: dict[str, Dtype] = {
    "bool": Dtype(1, "BOOL"),
    "uint8": Dtype(1, "U8"),
    "int8": Dtype(1, "I8"),
    "uint16": Dtype(2, "U16"),
    "int16": Dtype(2, "I16"),
    "uint32": Dtype(4, "U32"),
    "int32": Dtype(4, "I32"),
    "uint64": Dtype(8, "U64"),
    "int64": Dtype(8, "I64"),
    "float16": Dtype(2, "F16"),
    "bfloat16": Dtype(2, "BF16"),
    "float32": Dtype(4, "F32"),
    "float64": Dtype(8, "F64"),
    "float8_e4m3fn": Dtype(1, "F8_E4M3"),
    "float8_e5m2": Dtype(1, "F8_E5M2"),
    "float8_e4m3fnuz": Dtype(1, None),
    "float8_e5m2fnuz": Dtype(1, None),
    "float8_e8m0fnu": Dtype(1, None),
    "float4_e2m1fn_x2": Dtype(1, None),
    "complex32": Dtype(4, None),
    "complex64": Dtype(8, None),
    "complex128": Dtype(16, None),
    **{f"{sign}int{bits}": Dtype(1, None) for sign in ("", "u") for bits in range(1, 8)},
    "bits1x8": Dtype(1, None),
    "bits2x4": Dtype(1, None),
    "bits4x2": Dtype(1, None),
    "bits8": Dtype(1, None),
    "bits16": Dtype(2, None),
}
