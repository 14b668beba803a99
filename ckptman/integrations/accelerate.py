"""
accelerate: ``save_state`` and ``load_state`` by a `CheckpointManager`.

What an ``Accelerator`` prepared, and what was registered for checkpointing, is handed to a manager as live objects:
saved in the background, borrowed where it did not change, restored in place, without a staging directory or pickle.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ckptman.manager import CheckpointManager
from ckptman.storage.base import Storage

_WHOLE_ON_EVERY_RANK = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
}

_UNUSED = "_initial_iter_for_state_dict"


def manager_for(
    accelerator: Accelerator,
    root: str | os.PathLike[str] | Storage,
    state: Mapping[str, object] | None = None,
    **options: Any,
) -> CheckpointManager:
    """
    A manager of everything that *accelerator* has prepared by now.

    Call it after ``prepare`` and ``register_for_checkpointing``. Then ``manager.save(step)`` or ``maybe_save(step)`` is
    ``save_state``, and ``manager.restore()`` is ``load_state``.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from ckptman.integrations.accelerate import manager_for
        >>> accelerator = Accelerator(cpu=True)
        >>> model = accelerator.prepare(torch.nn.Linear(2, 2))
        >>> with manager_for(accelerator, "memory://accelerate") as manager:
        ...     manager.save(1, block=True).components
        ('model', 'accelerator', 'rng')

    Args:
        accelerator: What prepared the objects.
        root: As for `CheckpointManager`.
        state: Further components.
        options: Further arguments of `CheckpointManager`.

    Raises:
        ValueError: The objects are split over processes in a way that ckptman does not know (FSDP, DeepSpeed,
            Megatron, XLA), or *state* has a name that is taken.
    """
    own = state_of(accelerator)
    taken = sorted(own.keys() & (state or {}).keys())
    if taken:
        raise ValueError(f"the names {', '.join(taken)} are taken by what the accelerator has prepared")
    return CheckpointManager(root, {**own, **(state or {})}, **options)


def state_of(accelerator: Accelerator) -> dict[str, object]:
    """
    The live objects of *accelerator* by name: ``model``, ``optimizer``, ``scheduler``, ``loader``, ``registered`` (the
    second of a kind is ``model-1``, and so on), ``scaler``, and ``accelerator`` for its count of accumulated steps.

    *Not* among them: gradients accumulated so far, and what hooks for ``save_state`` would write.

    Raises:
        ValueError: As `manager_for`.
    """
    if accelerator.distributed_type not in _WHOLE_ON_EVERY_RANK:
        raise ValueError(
            f"ckptman cannot save what accelerate has prepared for {accelerator.distributed_type.value}: it needs the "
            "whole model in every process"
        )
    return {
        **_numbered("model", accelerator._models),
        **_numbered("optimizer", [wrapped.optimizer for wrapped in accelerator._optimizers]),
        **_numbered("scheduler", [getattr(one, "scheduler", one) for one in accelerator._schedulers]),
        **_numbered("loader", [PreparedLoader(loader) for loader in accelerator._dataloaders]),
        **({} if accelerator.scaler is None else {"scaler": accelerator.scaler}),
        **_numbered("registered", accelerator._custom_objects),
        "accelerator": _Count(accelerator),
    }


def _numbered(name: str, objects: Sequence[object]) -> dict[str, object]:
    return {name if index == 0 else f"{name}-{index}": one for index, one in enumerate(objects)}


class _Count:
    """How many batches were accumulated since the last optimizer step."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, int]:
        return {"step": self._accelerator.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._accelerator.step = state["step"]


class PreparedLoader:
    """
    The place of a prepared loader in its data: epoch, seed of the sampler, generator; and the batch, if it is stateful.

    accelerate keeps neither the epoch nor the seed, so its resumed loader begins again with the order of epoch 0. The
    middle of an epoch needs ``DataLoaderConfiguration(use_stateful_dataloader=True, use_seedable_sampler=True)``.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def state_dict(self) -> dict[str, Any]:
        """Epoch, sampler, position. Draws no number, starts no worker."""
        loader, sampler = self._loader, _sampler_of(self._loader)
        is_iterating = any(one is loader for one in loader.gradient_state.dataloader_references)
        # the epoch is counted once the last batch was taken back
        is_past_the_end = is_iterating and loader.end_of_dataloader
        generator = getattr(sampler, "generator", None)
        return {
            "iteration": loader.iteration + int(is_past_the_end),
            "seed": getattr(sampler, "initial_seed", None),
            "generator": generator.get_state() if isinstance(generator, torch.Generator) else None,
            "is_begun": not getattr(loader.base_dataloader, _UNUSED, False),
            "batch": loader.state_dict() if is_iterating and not is_past_the_end and _is_stateful(loader) else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the saved place; makes the iterator if that is within an epoch, so that its seed is drawn now."""
        loader, sampler = self._loader, _sampler_of(self._loader)
        if state["seed"] is not None and hasattr(sampler, "initial_seed"):
            sampler.initial_seed = state["seed"]
        generator = getattr(sampler, "generator", None)
        if state["generator"] is not None and isinstance(generator, torch.Generator):
            generator.set_state(state["generator"])
        loader.set_epoch(state["iteration"])
        if state["batch"] is not None:
            loader.load_state_dict(state["batch"])
            loader.base_dataloader.state_dict()
            loader.dl_state_dict = state["batch"]
        elif state["is_begun"] and _is_stateful(loader):
            # accelerate makes an iterator when it prepares the loader, for the first epoch only; later ones draw a seed
            loader.base_dataloader.load_state_dict({})


def _is_stateful(loader: Any) -> bool:
    return bool(getattr(loader, "use_stateful_dataloader", False))


def _sampler_of(loader: Any) -> Any:
    return loader.get_sampler() if hasattr(loader, "get_sampler") else None
