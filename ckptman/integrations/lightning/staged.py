"""
Strategies that write checkpoints their own way (FSDP, DeepSpeed, anybody's own): what they write becomes a checkpoint.

The strategy writes its files into a folder of ours, and they are put into the root as they are: verified, committed
at once, durable, retained. On the way back they are laid out in a folder again, from which the strategy loads.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from ckptman.errors import FormatError, StateMismatch
from ckptman.integrations.documents import Part
from ckptman.integrations.files import tag_of
from ckptman.integrations.lightning.paths import split
from ckptman.integrations.lightning.random_streams import gather_over
from ckptman.integrations.lightning.together import Loading, Together
from ckptman.repository.repository import Which
from ckptman.state.tensors import as_bytes

FILES = "files"
_FOLDER = ".ckptman-staged"


class StagedSaves:
    """
    Saves what the strategy of a Trainer writes, whatever that is, and gives it back to be loaded.

    Each rank saves the files that it sees and no lower rank does, so the folder may be shared by all or by the ranks of
    one machine. It lies in ``default_root_dir``, is there while something is saved or loaded, and needs the room of one
    checkpoint. Training waits until the checkpoint is committed.

    *Not* promised: what is in the files. ckptman does not look into them; a strategy may well write pickles, and run
    them when it loads. Nor can they be restored on another number of ranks than saved them.

    Collective: every rank has one, and calls the same methods in the same order.

    Attributes:
        together: The root.

    Raises:
        MisconfigurationException: There are several ranks without ``torch.distributed``; or ``default_root_dir`` is no
            path.
    """

    def __init__(self, trainer: Trainer, *, weights_only: bool) -> None:
        if trainer.world_size > 1 and not torch.distributed.is_initialized():
            raise MisconfigurationException(
                f"CkptmanCheckpoint cannot save from {type(trainer.strategy).__name__}: its ranks do not know each "
                "other through torch.distributed"
            )
        if "://" in str(trainer.default_root_dir):
            raise MisconfigurationException(
                f"{type(trainer.strategy).__name__} writes its own files, for which CkptmanCheckpoint needs a folder: "
                f"give Trainer a default_root_dir that is a path, not {trainer.default_root_dir}"
            )
        self._trainer = trainer
        self._weights_only = weights_only
        self._folder = Path(trainer.default_root_dir).absolute() / _FOLDER
        self._files = Part({})
        self.together = Together(trainer.strategy, lambda: {FILES: self._files})
        self._loading = Loading(trainer.strategy, self.load)

    def save(self, path: str, metrics: Mapping[str, float]) -> None:
        """Save as *path*, with the *metrics* of rank 0. Returns once it is committed; raises on all ranks alike."""
        trainer, strategy, (root, name) = self._trainer, self._trainer.strategy, split(path)
        manager = self.together.at(root)
        self.together.drop()
        document = trainer._checkpoint_connector.dump_checkpoint(self._weights_only)
        folder = strategy.broadcast(self._folder / tag_of(name))
        self._clear(folder)
        folder.mkdir(parents=True, exist_ok=True)
        strategy.save_checkpoint(document, folder / name)
        strategy.barrier()
        files = self._own_files(folder)
        try:
            content = {relative: _bytes_of(folder / relative) for relative in files}
            self._files.content = {"name": name, "world_size": trainer.world_size, "files": content}
            manager.save(
                trainer.global_step, tags=[tag_of(name)], metrics=strategy.broadcast(dict(metrics)), block=True
            )
        finally:
            self._files.content = {}
        self._clear(folder)

    def load(self, root: str, which: Which, weights_only: bool | None = None) -> dict[str, Any]:
        """
        Lay the files of *which* of *root* out, and let the strategy load them.

        Raises:
            StateMismatch: They were saved by another number of ranks.
            FormatError: They were not saved from such a strategy.
            IntegrityError, StorageError: As `CheckpointManager.restore`, on all ranks alike.
        """
        strategy = self._trainer.strategy
        self.together.at(root).restore(which)
        content, self._files.content = self._files.content, {}
        name, files = _checked(content, self._trainer.world_size)
        folder = strategy.broadcast(self._folder / "loaded")
        self._clear(folder)
        for relative, data in files.items():
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            (folder / relative).write_bytes(as_bytes(data))
        strategy.barrier()
        found = self._loading.theirs(folder / name, weights_only)
        self._clear(folder)
        return found

    def close(self, error: BaseException | None = None) -> None:
        """
        Leave the strategy and the root, as `Together.leave`; without an *error* wait for everything first.

        Raises what a save failed with.
        """
        self._loading.stop()
        self.together.leave(error)

    def _own_files(self, folder: Path) -> Sequence[str]:
        """What this rank is to save: the files that it sees and no lower rank does."""
        seen = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        gather = gather_over(self._trainer.world_size)
        everyone = [{"seen": seen}] if gather is None else gather({"seen": seen})
        lower = {path for one in everyone[: self._trainer.global_rank] for path in one["seen"]}
        return [path for path in seen if path not in lower]

    def _clear(self, folder: Path) -> None:
        """Remove *folder*, once all ranks are done with it."""
        self._trainer.strategy.barrier()
        if self._trainer.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self._trainer.strategy.barrier()


def _bytes_of(path: Path) -> torch.Tensor:
    """The file *path*, mapped: its bytes are read when they are staged."""
    nbytes = path.stat().st_size
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(str(path), shared=False, size=nbytes, dtype=torch.uint8)


def _checked(content: object, world_size: int) -> tuple[str, Mapping[str, torch.Tensor]]:
    if not isinstance(content, dict) or content.keys() != {"name", "world_size", "files"}:
        raise FormatError("this checkpoint does not hold the files of a strategy")
    if content["world_size"] != world_size:
        raise StateMismatch(
            f"the strategy's files were saved by {content['world_size']} ranks, and {world_size} run now: only as many "
            "can load them"
        )
    for relative in (content["name"], *content["files"]):
        if Path(relative).is_absolute() or ".." in Path(relative).parts:
            raise FormatError(f"the checkpoint holds a file {relative!r:.80}, which would lie outside of its folder")
    return content["name"], content["files"]
