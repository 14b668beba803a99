"""
Documents: the checkpoint dicts that frameworks build and want back, kept in a root without pickle.

A framework such as Lightning makes one dict of ``state_dict``s and progress, and later wants an equal one. Every
entry that is a dict or list becomes a component of its own, weights the kind that a module has, so that they can be
restored into a plain ``nn.Module`` as well; what is left is the component ``document``, which also says how to put the
dict together again. Values outside of the closed typed encoding are refused with their path.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch

from ckptman.coordinator import Solo
from ckptman.errors import CheckpointNotFound, FormatError, IntegrityError
from ckptman.format.catalog import Entry
from ckptman.format.names import check_component
from ckptman.integrations.files import drop, named
from ckptman.manager import CheckpointManager
from ckptman.pipeline.background import PendingSave
from ckptman.pipeline.budget import Limits
from ckptman.pipeline.reading import fill
from ckptman.repository.keep import Keep
from ckptman.repository.repository import Repository, Which, all_damaged, find, warn_passed_over
from ckptman.state.filling import CPU, Filling
from ckptman.state.stored import Stored
from ckptman.state.trees import give_tree
from ckptman.storage.base import Storage
from ckptman.storage.opening import open_storage

DOCUMENT = "document"


class Part:
    """An entry of a document, or what is left of it: saved as it is."""

    def __init__(self, content: object) -> None:
        self.content = content

    def state_dict(self) -> object:
        return self.content

    def load_state_dict(self, content: object) -> None:
        self.content = content


class Weights(torch.nn.Module):
    """The ``state_dict`` of a module, saved as that module itself would be."""

    def __init__(self, content: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._buffers = dict(content)  # register_buffer refuses the dots in the names


class Documents:
    """
    A root that holds documents.

    Args:
        root: As for `CheckpointManager`.
        names: Key of a document → the name of its component, where that is not the key itself.
        keep: What to retain.
        lock_timeout: Seconds to wait for another writer to go away.

    Use it from one thread. *Not* promised: that an object is still the same one when it comes back, or that two places
    still share it; tensors come back on the CPU.
    """

    def __init__(
        self, root: str | Storage, *, names: Mapping[str, str], keep: Keep = named, lock_timeout: float = 60.0
    ) -> None:
        self._root = root
        self._names = dict(names)
        self._keep = keep
        self._lock_timeout_s = lock_timeout
        self._manager: CheckpointManager | None = None
        self._parts: dict[str, Part | Weights] = {}

    def save(
        self,
        document: Mapping[str, object],
        step: int,
        *,
        tags: Iterable[str] = (),
        metrics: Mapping[str, float] | None = None,
        block: bool = True,
    ) -> PendingSave:
        """Save *document* as *step*. Promises and raises what `CheckpointManager.save` does."""
        parts = take_apart(document, self._names)
        manager = self._manager_of(parts)
        return manager.save(step, tags=tags, metrics=metrics, block=block)

    def _manager_of(self, parts: dict[str, Part | Weights]) -> CheckpointManager:
        """The manager whose state is *parts*: the same one as long as the components are the same."""
        if self._manager is not None and _kinds(parts) == _kinds(self._parts):
            for name, part in parts.items():
                _refill(self._parts[name], part)
            return self._manager
        self.close()
        # without prefault: a save that blocks, as most of a framework's do, takes no staging memory
        limits = Limits(prefault=False)
        self._manager = CheckpointManager(
            self._root,
            parts,
            keep=self._keep,
            rng=False,
            lock_timeout=self._lock_timeout_s,
            limits=limits,
            coordinator=Solo(),  # a document is whole on the rank that the framework lets save
        )
        self._parts = parts
        return self._manager

    def drop(self, tag: str) -> None:
        """Let the checkpoint with the name *tag* go, as `files.drop` does."""
        drop(self._manager_of(self._parts or {DOCUMENT: Part({})}), tag)

    def wait(self) -> None:
        """Wait until nothing is under way. Raises what a save failed with that nobody has collected."""
        if self._manager is not None:
            self._manager.wait()

    def close(self) -> None:
        """Wait, and let go of the root. It is taken again by the next save. Raises as ``wait`` does."""
        manager, self._manager, self._parts = self._manager, None, {}
        if manager is not None:
            manager.close()


def take_apart(document: Mapping[str, object], names: Mapping[str, str]) -> dict[str, Part | Weights]:
    """The components of *document*."""
    parts: dict[str, Part | Weights] = {}
    places: dict[str, str] = {}
    weights: dict[str, object] = {}
    rest: dict[object, object] = {}
    for key, value in document.items():
        name = names.get(key, key) if isinstance(key, str) else ""
        if not isinstance(value, (dict, list)) or not value or not _is_free(name, parts):
            rest[key] = value
            continue
        places[key] = name
        if _is_weights(value):
            parts[name] = Weights(value)
            weights[key] = {"ordered": type(value) is OrderedDict, "metadata": getattr(value, "_metadata", None)}
        else:
            parts[name] = Part(value)
    whole = {"order": list(document), "places": places, "weights": weights, "rest": rest}
    return {**parts, DOCUMENT: Part(whole)}


def without_parts(rest: Mapping[str, object], weights: Mapping[str, str]) -> dict[str, object]:
    """
    The component ``document`` of a document whose *weights* (key → component) are saved as live modules beside it, so
    that it can be read whole, too.
    """
    plain = {key: {"ordered": True, "metadata": None} for key in weights}
    return {"order": [*weights, *rest], "places": dict(weights), "weights": plain, "rest": dict(rest)}


def rest_of(whole: object) -> dict[Any, Any]:
    """What the component ``document`` itself holds. Raises FormatError if it is none."""
    if not isinstance(whole, dict) or whole.keys() != {"order", "places", "weights", "rest"}:
        raise FormatError("this checkpoint was not saved by a framework: it has no document")
    return dict(whole["rest"])


def put_together(parts: Mapping[str, object]) -> dict[Any, Any]:
    """The document whose components came back as *parts*. Raises FormatError if it never was one."""
    whole = parts.get(DOCUMENT)
    if not isinstance(whole, dict) or whole.keys() != {"order", "places", "weights", "rest"}:
        raise FormatError(f"this checkpoint was not saved by a framework: it has the components {', '.join(parts)}")
    document = {}
    for key in whole["order"]:
        value = parts[whole["places"][key]] if key in whole["places"] else whole["rest"][key]
        if key in whole["weights"]:
            value = _state_dict(value, **whole["weights"][key])
        document[key] = value
    return document


def _state_dict(stored: Any, *, ordered: bool, metadata: object) -> dict[str, object]:
    if not ordered:
        return dict(stored["entries"])
    state: OrderedDict[str, object] = OrderedDict(stored["entries"])
    if metadata is not None:
        state._metadata = metadata  # type: ignore[attr-defined]  # where load_state_dict looks for it
    return state


def read(root: str | Storage, which: Which = "latest") -> tuple[Entry, dict[Any, Any]]:
    """
    Read a document; every byte is checked. Takes no lock, touches no live object.

    ``"latest"`` walks back past damaged checkpoints, with a `DamagedCheckpointWarning` for each.

    Raises:
        CheckpointNotFound: There is no such checkpoint.
        IntegrityError: It is damaged; for ``"latest"``: all of them are.
        FormatError: It was not saved as a document.
    """
    storage = open_storage(root)
    repository = Repository(storage)
    entries = repository.entries()
    if which != "latest":
        entry = find(entries, which, storage.url)
        return entry, _read(storage, repository, entry)
    faults = []
    for entry in reversed(entries):
        try:
            return entry, _read(storage, repository, entry)
        except IntegrityError as error:
            faults.append((entry.step, error))
            warn_passed_over(entry.step, storage.url, error)
    if faults:
        raise all_damaged(faults, storage.url)
    raise CheckpointNotFound(f"{storage.url} has no checkpoint")


def _read(storage: Storage, repository: Repository, entry: Entry) -> dict[Any, Any]:
    manifest = repository.manifest(entry)
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    filling = Filling(tensors, {})
    gives = {}
    for name in manifest.shared_components:  # what a rank has of its own is for that rank
        stored = Stored(manifest, name, tensors)
        gives[name] = give_tree(None, stored.tree, stored, filling, device=CPU)
    fill(storage, manifest, filling.targets, threads=Limits().io_threads)
    return put_together({name: give() for name, give in gives.items()})


def _is_free(name: str, parts: Mapping[str, object]) -> bool:
    try:
        check_component(name)
    except ValueError:
        return False
    return name.lower() not in {DOCUMENT, *(taken.lower() for taken in parts)}


def _is_weights(value: object) -> TypeGuard[dict[str, torch.Tensor]]:
    return (
        isinstance(value, dict)
        and type(value) in (dict, OrderedDict)
        and all(isinstance(key, str) and key for key in value)
        and all(isinstance(tensor, torch.Tensor) for tensor in value.values())
    )


def _kinds(parts: Mapping[str, Part | Weights]) -> dict[str, type]:
    return {name: type(part) for name, part in parts.items()}


def _refill(old: Part | Weights, new: Part | Weights) -> None:
    if isinstance(old, Weights) and isinstance(new, Weights):
        old._buffers = new._buffers
    elif isinstance(old, Part) and isinstance(new, Part):
        old.content = new.content
