"""What differs between two checkpoints, as far as their manifests tell: by name, shape, dtype and digest."""

from __future__ import annotations

from dataclasses import dataclass

from ckptman.format.manifest import Manifest, Tensor, box_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Names of tensors: in B only, in A only, of another shape or dtype, with other bytes; how many are the same."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    reshaped: tuple[str, ...]
    changed: tuple[str, ...]
    same: int


def difference(a: Manifest, b: Manifest) -> Difference:
    """
    What changed from *a* to *b*. Equal digests count as equal bytes; tied names are compared like any other.

    Tensors that are cut into chunks differently are reported as changed, whatever their bytes are.
    """
    old, new = _named(a), _named(b)
    common = [name for name in new if name in old]
    reshaped = [n for n in common if (old[n].shape, old[n].dtype) != (new[n].shape, new[n].dtype)]
    different = set(reshaped)
    changed = [n for n in common if n not in different and _digests(old[n]) != _digests(new[n])]
    return Difference(
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        reshaped=tuple(reshaped),
        changed=tuple(changed),
        same=len(common) - len(reshaped) - len(changed),
    )


def _named(manifest: Manifest) -> dict[str, Tensor]:
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    return tensors | {alias: tensors[name] for alias, name in manifest.aliases.items()}


def _digests(tensor: Tensor) -> object:
    return sorted((box_of(chunk, tensor), chunk.digests) for chunk in tensor.chunks)
