"""A checkpoint in memory: capture → bytes and a manifest → prepare, fill, finish. Everything but a storage is real."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
import torch

from ckptman.format.digest import digests
from ckptman.format.dtypes import DTYPES
from ckptman.format.manifest import Chunk, Component, File, Manifest, Tensor, read_manifest, write_manifest
from ckptman.state.capture import Captured, capture
from ckptman.state.restore import Restoration, prepare
from ckptman.state.tensors import as_bytes, dtype_name

ATTEMPT = "step-000000000001.w0001.00000000"


@dataclass(frozen=True)
class Saved:
    """What a storage would hold."""

    manifest: Manifest
    data: dict[str, bytes]
    captured: dict[str, Captured]


def contiguous_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of *tensor*, the way a pipeline gets at them."""
    return bytes(as_bytes(tensor if tensor.is_contiguous() else tensor.contiguous()))


def save(state: Mapping[str, object], *, rng: bool = False) -> Saved:
    captured = capture(state, rng=rng)
    data = {leaf.name: contiguous_bytes(leaf.tensor) for one in captured.values() for leaf in one.leaves}
    tensors, start = [], 1000
    for one in captured.values():
        for leaf in one.leaves:
            content = data[leaf.name]
            dtype, shape = dtype_name(leaf.tensor.dtype), tuple(leaf.tensor.shape)
            assert len(content) == leaf.tensor.numel() * DTYPES[dtype].itemsize
            chunk = Chunk(file=0, start=start, nbytes=len(content), digests=digests(content))
            tensors.append(Tensor(name=leaf.name, dtype=dtype, shape=shape, chunks=(chunk,)))
            start += len(content)
    file = File(path=f"{ATTEMPT}/all.safetensors", nbytes=start, header_nbytes=900, header_digest="0" * 32)
    manifest = Manifest(
        root="r",
        step=1,
        attempt=ATTEMPT,
        after=0,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        world_size=1,
        metrics={},
        preempted=False,
        components={name: Component(kind=one.kind, values=msgspec.Raw(one.values)) for name, one in captured.items()},
        files=(file,),
        tensors=tuple(tensors),
        aliases={alias: name for one in captured.values() for alias, name in one.aliases.items()},
        environment={},
    )
    # through its file and back: what is used below is what a reader would see
    return Saved(read_manifest(write_manifest(manifest), ATTEMPT), data, captured)


def begin(
    state: Mapping[str, object],
    saved: Saved,
    *,
    only: Collection[str] | None = None,
    strict: bool = True,
    rng: bool = False,
) -> Restoration:
    return prepare(state, saved.manifest, only=only, strict=strict, rng=rng)


def fill(restoration: Restoration, saved: Saved) -> None:
    stored = {tensor.name: tensor for tensor in saved.manifest.tensors}
    for name, target in restoration.targets.items():
        assert dtype_name(target.dtype) == stored[name].dtype
        assert tuple(target.shape) == stored[name].shape
        if target.is_contiguous():
            as_bytes(target)[:] = saved.data[name]
            continue
        source = torch.empty(target.shape, dtype=target.dtype)
        as_bytes(source)[:] = saved.data[name]
        with torch.no_grad():
            target.copy_(source)


def load(
    state: Mapping[str, object],
    saved: Saved,
    *,
    only: Collection[str] | None = None,
    strict: bool = True,
    rng: bool = False,
) -> dict[str, object]:
    restoration = begin(state, saved, only=only, strict=strict, rng=rng)
    fill(restoration, saved)
    return restoration.finish()


def frozen(state: object) -> object:
    """A copy of a state's tree in which tensors are their dtype, shape and bytes: to be compared with ``==``."""
    if isinstance(state, torch.Tensor):
        if state.layout != torch.strided:
            return ("sparse", str(state.layout), frozen(state.to_dense()))
        plain = state.detach().resolve_conj().resolve_neg().contiguous()
        return (str(plain.dtype), tuple(plain.shape), bytes(as_bytes(plain)))
    if isinstance(state, dict):
        return {key if not isinstance(key, torch.Tensor) else id(key): frozen(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [frozen(value) for value in state]
    if hasattr(state, "tobytes"):
        return (str(state.dtype), state.shape, state.tobytes())  # type: ignore[attr-defined]
    return state
