"""
What single ranks have of their own: random streams, loaders, whatever differs between ranks.

Most of a state is stored once for all ranks. Where rank 3 has something else than rank 0, the manifest names it after
both: the component ``rng.rank-00003`` with the values of rank 3, the tensor ``rng.rank-00003/torch``. Values of rank 3
refer to tensors by their plain names, and mean rank 3's own where there is one.
"""

from __future__ import annotations

from ckptman.format.manifest import Component, Manifest
from ckptman.format.names import rank_name, split_rank


def own_name(tensor: str, rank: int) -> str:
    """What *rank* calls its own tensor: ``rng/torch`` is ``rng.rank-00001/torch`` of rank 1."""
    component, slash, inner = tensor.partition("/")
    return f"{rank_name(component, rank)}{slash}{inner}"


def component_of(manifest: Manifest, name: str, rank: int) -> Component:
    """The component *name* as *rank* saved it: its own, or the one that it shares with rank 0."""
    return manifest.components.get(rank_name(name, rank)) or manifest.components[name]


def ranks_with_own(manifest: Manifest) -> dict[str, set[int]]:
    """Component → the ranks that have values or tensors of their own in it. What rank 0 has is what all share."""
    found: dict[str, set[int]] = {name: set() for name in manifest.shared_components}
    if manifest.world_size > 1:
        for part in {*manifest.components, *(tensor.name.partition("/")[0] for tensor in manifest.tensors)}:
            name, rank = split_rank(part)
            if rank:
                found[name].add(rank)
    return found
