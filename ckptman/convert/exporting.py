"""Export: one checkpoint of a root becomes a file or a directory that other tools read."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ckptman.convert import dcp, huggingface, optimizers, safetensors_file, torch_file
from ckptman.convert.exported import Exported, Wanted
from ckptman.convert.placing import new_file, placed, refuse_taken
from ckptman.convert.stored import Progress, StoredCheckpoint
from ckptman.repository.repository import Which
from ckptman.storage.base import Storage
from ckptman.storage.opening import local_path, open_storage

Writer = Callable[[StoredCheckpoint, Path, Wanted], Exported]


def export_checkpoint(
    root: str | os.PathLike[str] | Storage,
    which: Which,
    out: str | os.PathLike[str],
    *,
    to: str,
    components: Collection[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    shard_nbytes: int = 5_000_000_000,
    storage_options: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """
    Write a checkpoint in another tool's format. Every byte is checked on the way, and durable when this returns.

    *out* appears when it is complete: until then it is written beside it. Memory is taken for 64 MiB of tensors, or for
    the largest one if that is larger. The root is not changed, and no lock is taken.

    Args:
        root: As for `CheckpointManager`.
        which: ``"latest"``, a step, ``"best:METRIC:min"`` (or ``:max``), or a tag.
        out: A new path (or an empty directory).
        to: ``"torch"``: one file for ``torch.load(…, weights_only=True)``, a dict of the components' states.
            ``"safetensors"``: one file of all tensors; the values are in its metadata, so that importing it again
            gives the same checkpoint. ``"hf"``: a directory that ``from_pretrained`` loads: the weights of one module
            and its configuration. ``"dcp"``: a directory for ``torch.distributed.checkpoint``, optimizers by name.
        components: Which ones; None for all.
        config: The model's ``config.json``, for ``"hf"``, where the checkpoint has none.
        shard_nbytes: Where to begin a further file of weights, for ``"hf"``.
        storage_options: For the driver of *root*'s URL, as for `CheckpointManager`.
        progress: Called in between with how many bytes of tensors are done, and of how many.

    Raises:
        CheckpointNotFound: There is no such checkpoint or component.
        UnsupportedState: The format cannot hold something; the message names it.
        IntegrityError: The checkpoint is damaged. Nothing was exported.
        StorageError: *out* exists, or a medium failed. Nothing was exported.
        ValueError: *to* is no format, or *out* a URL.
    """
    writer = _WRITERS.get(to)
    if writer is None:
        raise ValueError(f"to={to!r} is no format; there are {', '.join(_WRITERS)}")
    if shard_nbytes < 1:
        raise ValueError(f"shard_nbytes must be positive, got {shard_nbytes}")
    path = local_path(out)
    refuse_taken(path)
    only = None if components is None else ({components} if isinstance(components, str) else set(components))
    source = StoredCheckpoint(open_storage(root, storage_options=storage_options), which, only, progress)
    wanted = Wanted(config=None if config is None else Path(config), shard_nbytes=shard_nbytes)
    return writer(source, path, wanted)


def states(source: StoredCheckpoint, optimizer: Callable[[Any], Any]) -> dict[str, Any]:
    """The state of every component as its live object would give it; of an optimizer what *optimizer* makes of it."""
    trees = {name: source.tree(name) for name in source.components}
    made = {"module": lambda tree: dict(tree["entries"]), "optimizer": optimizer}
    return {name: made[kind](tree) if (kind := source.kind(name)) in made else tree for name, tree in trees.items()}


def _to_torch(source: StoredCheckpoint, path: Path, _: Wanted) -> Exported:
    with placed(path) as temporary, new_file(temporary) as out:
        nbytes = torch_file.write(out, states(source, optimizers.positional), source)
    return Exported(
        checkpoint=source.checkpoint, path=path, nbytes=nbytes, components=source.components, left_out=source.left_out
    )


def _to_safetensors(source: StoredCheckpoint, path: Path, _: Wanted) -> Exported:
    with placed(path) as temporary, new_file(temporary) as out:
        nbytes = safetensors_file.write(out, source)
    return Exported(
        checkpoint=source.checkpoint, path=path, nbytes=nbytes, components=source.components, left_out=source.left_out
    )


def _to_dcp(source: StoredCheckpoint, path: Path, _: Wanted) -> Exported:
    return dcp.write(source, path, lambda: states(source, optimizers.by_name))


_WRITERS: Mapping[str, Writer] = {
    "dcp": _to_dcp,
    "hf": huggingface.write,
    "safetensors": _to_safetensors,
    "torch": _to_torch,
}
