"""
Those who save and load: ckptman and its rivals behind one small face, each used as its own documentation says.

A tool lives in one process and saves under one folder. ``save`` and ``load`` block; ``begin`` returns once training may
go on, with a function that waits for the rest. None of the rivals verifies what it loads, but moonclip.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from benchmarks.states import State

Wait = Callable[[], object]


class Tool(Protocol):
    """How a contestant saves and loads."""

    name: ClassVar[str]
    module: ClassVar[str]
    """What must be importable."""

    def __init__(self, folder: Path, state: State) -> None: ...
    def save(self, step: int) -> None: ...
    def load(self, step: int) -> None: ...
    def close(self) -> None: ...


class AsyncTool(Tool, Protocol):
    """One that can save behind training's back."""

    def begin(self, step: int) -> Wait: ...


class _Tool:
    def __init__(self, folder: Path, state: State) -> None:
        self.folder, self.state = folder, state
        self.open()

    def open(self) -> None:
        """What is built once."""

    def close(self) -> None:
        """Let go of threads and processes."""

    def at(self, step: int) -> Path:
        return self.folder / str(step)


class Ckptman(_Tool):
    name = "ckptman"
    module = "ckptman"
    keywords: ClassVar[dict[str, object]] = {}

    def open(self) -> None:
        from ckptman import CheckpointManager

        self.manager = CheckpointManager(self.folder, self.state.components, **self.keywords)

    def save(self, step: int) -> None:
        self.manager.save(step, block=True)

    def begin(self, step: int) -> Wait:
        return self.manager.save(step).result

    def load(self, step: int) -> None:
        assert self.manager.restore(step) is not None

    def load_model(self, step: int) -> None:
        assert self.manager.restore(step, only=("model",)) is not None

    def close(self) -> None:
        self.manager.close()


class CkptmanOverlap(Ckptman):
    name = "ckptman, overlap"
    keywords: ClassVar[dict[str, object]] = {"overlap": True}


class TorchSave(_Tool):
    name = "torch.save"
    module = "torch"

    def save(self, step: int) -> None:
        torch.save(self.state.dicts, self.folder / f"{step}.pt")

    def load(self, step: int) -> None:
        loaded = torch.load(self.folder / f"{step}.pt", weights_only=True)
        self.state.model.load_state_dict(loaded["model"])
        self.state.optimizer.load_state_dict(loaded["optimizer"])


class Safetensors(_Tool):
    """Tensors only: the optimizer's groups are left out."""

    name = "safetensors"
    module = "safetensors"

    def save(self, step: int) -> None:
        from safetensors.torch import save_file

        save_file(self.state.tensors, self.folder / f"{step}.safetensors")

    def load(self, step: int) -> None:
        from safetensors.torch import load_file

        self.state.place(load_file(self.folder / f"{step}.safetensors"))


class Dcp(_Tool):
    name = "DCP"
    module = "torch.distributed.checkpoint"

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state.dicts, checkpoint_id=self.at(step), no_dist=True)

    def load(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(self.state.dicts, checkpoint_id=self.at(step), no_dist=True)  # in place: the tensors are the live ones


class DcpAsync(Dcp):
    name = "DCP async_save"

    def begin(self, step: int) -> Wait:
        import torch.distributed.checkpoint as dcp

        return dcp.async_save(self.state.dicts, checkpoint_id=self.at(step), no_dist=True).result


class DcpStager(Dcp):
    """Stages on a thread. Safe only for a user who waits for ``staging_completion`` before ``optimizer.step``."""

    name = "DCP async_save, DefaultStager"

    def open(self) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False
            )
        )

    def begin(self, step: int) -> Wait:
        import torch.distributed.checkpoint as dcp

        saving = dcp.async_save(self.state.dicts, checkpoint_id=self.at(step), async_stager=self.stager, no_dist=True)
        self.staged = saving.staging_completion
        return saving.upload_completion.result

    def before_step(self) -> None:
        """What its user has to remember."""
        self.staged.result()

    def close(self) -> None:
        self.stager.close()


class Torchsnapshot(_Tool):
    name = "torchsnapshot"
    module = "torchsnapshot"

    def save(self, step: int) -> None:
        from torchsnapshot import Snapshot

        Snapshot.take(str(self.at(step)), self.state.components)

    def begin(self, step: int) -> Wait:
        from torchsnapshot import Snapshot

        return Snapshot.async_take(str(self.at(step)), self.state.components).wait

    def load(self, step: int) -> None:
        from torchsnapshot import Snapshot

        Snapshot(str(self.at(step))).restore(self.state.components)


class TorchCheckpointing(_Tool):
    """Without direct I/O, which fails on ext4, and without mmap, which would leave the moments unread."""

    name = "torch_checkpointing"
    module = "torch_checkpointing"

    def manager(self, *, behind: bool):
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import CheckpointLoaderConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        make = CheckpointManager.Config.with_async_save if behind else CheckpointManager.Config.with_sync_save
        settings = make()
        settings.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        settings.load = CheckpointLoaderConfig(use_mmap=False)
        self.opened = settings.build()
        return self.opened

    def save(self, step: int) -> None:
        opened = getattr(self, "opened", None) or self.manager(behind=False)
        opened.save(str(self.at(step)), self.state.dicts)

    def load(self, step: int) -> None:
        loaded = self.manager(behind=False).load(str(self.at(step)), into=self.state.dicts)
        self.state.model.load_state_dict(loaded["model"])
        self.state.optimizer.load_state_dict(loaded["optimizer"])

    def close(self) -> None:
        if hasattr(self, "opened"):
            self.opened.close()


class TorchCheckpointingAsync(TorchCheckpointing):
    """Stages on a thread. Safe only for a user who steps under ``manager.lock()``."""

    name = "torch_checkpointing, async"

    def open(self) -> None:
        self.manager(behind=True)

    def begin(self, step: int) -> Wait:
        return self.opened.save(str(self.at(step)), self.state.dicts).result

    def before_step(self) -> None:
        """What its user has to remember."""
        with self.opened.lock():
            pass


class Moonclip(_Tool):
    name = "moonclip"
    module = "moonclip"
    behind = False

    def open(self) -> None:
        from moonclip import CheckpointManager

        self.manager = CheckpointManager(storage_root=str(self.folder / "moonclip"), async_save=self.behind)

    def save(self, step: int) -> None:
        self.manager.save(step, model=self.state.model, optimizer=self.state.optimizer)

    def load(self, step: int) -> None:
        self.manager.load_latest(model=self.state.model, optimizer=self.state.optimizer)


class MoonclipAsync(Moonclip):
    name = "moonclip, async"
    behind = True

    def begin(self, step: int) -> Wait:
        self.save(step)
        return self.manager.flush


class Orbax(_Tool):
    """A flat tree of NumPy arrays; what it loads is copied into the live tensors."""

    name = "orbax"
    module = "orbax.checkpoint"

    def tree(self) -> dict[str, object]:
        return {name: tensor.numpy() for name, tensor in self.state.tensors.items()}

    def open(self) -> None:
        import orbax.checkpoint as ocp

        self.checkpointer = ocp.PyTreeCheckpointer()

    def save(self, step: int) -> None:
        self.checkpointer.save(self.at(step), self.tree())

    def load(self, step: int) -> None:
        loaded = self.checkpointer.restore(self.at(step))
        self.state.place({name: torch.as_tensor(array) for name, array in loaded.items()})

    def close(self) -> None:
        self.checkpointer.close()


class OrbaxAsync(Orbax):
    name = "orbax, async"

    def open(self) -> None:
        import orbax.checkpoint as ocp

        self.checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

    def begin(self, step: int) -> Wait:
        self.checkpointer.save(self.at(step), self.tree())
        return self.checkpointer.wait_until_finished


RIVALS: tuple[type[Tool], ...] = (TorchSave, Safetensors, Dcp, Torchsnapshot, TorchCheckpointing, Moonclip, Orbax)
ASYNC_RIVALS: tuple[type[AsyncTool], ...] = (
    DcpAsync, DcpStager, Torchsnapshot, TorchCheckpointingAsync, MoonclipAsync, OrbaxAsync,
)  # fmt: skip
