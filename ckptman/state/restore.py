"""The whole state, given back: first everything is compared, then targets are filled, then the steps are taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ckptman.format.manifest import Manifest
from ckptman.state.dtensor import settle
from ckptman.state.filling import Filling
from ckptman.state.kinds import GLOBAL_RNG, RNG, prepare_component
from ckptman.state.optimizers import names_of_parameters
from ckptman.state.reranking import Reranking
from ckptman.state.rng import snapshot, untouched
from ckptman.state.stored import Stored
from ckptman.warning import warn


class Restoration:
    """
    A restore that was found possible. Nothing was touched yet.

    Attributes:
        targets: Name of a stored tensor → the tensor to be filled with exactly its dtype and shape: the live one
            where that can be written to, else a new one. Not necessarily contiguous or on the CPU; ``copy_`` serves.
        is_complete: Whether it restores all of the live state: nothing was left out, by *only* or by ``strict=False``.
    """

    def __init__(self, filling: Filling, *, is_complete: bool) -> None:
        self._filling = filling
        self.targets: Mapping[str, torch.Tensor] = filling.targets
        self.is_complete = is_complete

    def finish(self) -> dict[str, object]:
        """
        Give the filled state back: modules, optimizers, everything else in the order of the state, random streams.

        To be called once, after all targets were filled.

        Returns:
            The plain values of the state, by component.

        Raises:
            StateMismatch: A ``load_state_dict`` refused its state. The live state is then partly restored.
        """
        with torch.inference_mode(False), torch.no_grad():
            self._filling.finish()
        return self._filling.values


def prepare(
    state: Mapping[str, object],
    manifest: Manifest,
    *,
    only: Collection[str] | None,
    strict: bool,
    rng: bool,
    rank: int = 0,
    world_size: int = 1,
) -> Restoration:
    """
    Compare the checkpoint with the live *state*, and find the places for its tensors. Touches nothing.

    Args:
        state: Component name → live object.
        manifest: What is stored.
        only: The components to restore; None for all of them. Others are not even compared.
        strict: Whether something that only one side has is an error. If not, it is left out, with one warning.
        rng: Whether the global random streams are restored (if *only* is None or names ``rng``).
        rank: Which rank this is.
        world_size: Of how many. Where another number of ranks saved the checkpoint, see `ckptman.state.reranking`.

    Raises:
        StateMismatch: They disagree; every difference is named.
        UnsupportedState: A live object is of a kind that can be neither saved nor restored.
        FormatError: The checkpoint's values are not as their kinds demand.
        ValueError: *only* names a component that neither side has.
    """
    settle(state)
    live = {**state, RNG: snapshot()} if rng else dict(state)
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    filling = Filling(tensors, names_of_parameters(state))
    reranking = Reranking.of(manifest, tensors, rank, world_size)
    with torch.inference_mode(False), torch.no_grad(), untouched():
        for name in _chosen(live, manifest, only):
            if name not in manifest.components:
                _lacking(name, filling)
            elif name in live:
                if reranking is None or not reranking.prepare(live[name], name, filling):
                    own = rank if reranking is None else 0
                    prepare_component(live[name], Stored(manifest, name, tensors, rank=own), filling)
            else:
                filling.differences.tolerable(f"{name}: the checkpoint has this component, the live state does not")
    filling.differences.settle(strict=strict)
    for warning in filling.warnings:
        warn(f"restoring {warning}")
    return Restoration(filling, is_complete=only is None and filling.differences.is_empty)


def _lacking(name: str, filling: Filling) -> None:
    if name == RNG:
        filling.warnings.append("random streams: none were saved in this checkpoint; they stay as they are")
    else:
        filling.differences.tolerable(f"{name}: the live state has this component, the checkpoint does not")


def _chosen(live: Mapping[str, object], manifest: Manifest, only: Collection[str] | None) -> list[str]:
    # streams that nobody asked for are no component that the live state lacks
    saved = [name for name in manifest.shared_components if manifest.components[name].kind != GLOBAL_RNG.name]
    known = [*live, *(name for name in saved if name not in live)]
    if only is None:
        return known
    names = {only} if isinstance(only, str) else set(only)
    unknown = sorted(names - set(known))
    if unknown:
        raise ValueError(f"only={unknown} names no component; there are {', '.join(known)}")
    return [name for name in known if name in names]
