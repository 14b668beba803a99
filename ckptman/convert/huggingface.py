"""
Directories of Hugging Face: ``checkpoint-N`` of the Trainer, and what ``save_pretrained`` writes.

``training_args.bin`` is a pickle of Hugging Face's own classes: it is never opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ckptman.convert import safetensors_file, torch_file
from ckptman.convert.exported import Exported, Wanted
from ckptman.convert.files import Files
from ckptman.convert.foreign import Foreign, ForeignTensor, Part, guessed, module
from ckptman.convert.placing import new_file, new_folder, placed
from ckptman.convert.stored import StoredCheckpoint, StoredTensor
from ckptman.convert.streams import streams
from ckptman.errors import FormatError, UnsupportedState

TRAINER_STATE = "trainer_state.json"
CONFIG = "config"
CONFIG_FILE = "config.json"
MAX_JSON_NBYTES = 1 << 28

_NUMBERED = re.compile(r"checkpoint-([0-9]{1,18})")
_RANK_STREAMS = re.compile(r"rng_state_[0-9]+\.pth")
_CONFIGS = (CONFIG_FILE, "generation_config.json", "adapter_config.json", "preprocessor_config.json")
_STATES = {"optimizer.pt": "optimizer", "scheduler.pt": "scheduler", "scaler.pt": "scaler"}

Tensors = Mapping[str, ForeignTensor]


def is_directory_of(path: Path) -> bool:
    """Whether *path* looks like a directory of Hugging Face."""
    names = [TRAINER_STATE, CONFIG_FILE, "adapter_config.json", "training_args.bin", *_WEIGHTS]
    return bool(_NUMBERED.fullmatch(path.name)) or any((path / name).exists() for name in names)


def read(path: Path, files: Files) -> Foreign:
    """
    The components of the directory at *path*: ``model`` (or ``adapter``), ``optimizer``, ``scheduler``, ``scaler``,
    ``rng``, ``trainer_state`` and ``config``, as far as they are there.

    Raises:
        FormatError: It is incomplete: no weights, or a Trainer's directory without its state; or a file is damaged.
        UnsupportedState: A file would have to be unpickled.
    """
    names = sorted(entry.name for entry in path.iterdir())
    taken: set[str] = set()
    parts = dict(_weights(path, names, files, taken))
    for name, component in _STATES.items():
        if name in names:
            taken.add(name)
            tree = torch_file.load(files.open(path / name).whole())
            parts[component] = Part("stateful", tree)
    left_out = list(_streams(path, names, files, parts, taken))
    step = _trainer_state(path, names, files, parts, taken)
    configs = {name: read_json(path / name, files) for name in _CONFIGS if name in names}
    if configs:
        parts[CONFIG] = Part("container", configs)
    left_out += [_left_out(name) for name in names if name not in taken and name not in configs]
    return Foreign(
        format="a directory of Hugging Face",
        parts=parts,
        step=step,
        left_out=tuple(left_out),
        missing=() if step is None else tuple(_missing(names)),
    )


def _missing(names: list[str]) -> Iterator[str]:
    """What the Trainer writes with every checkpoint, unless it was told to save the weights only."""
    yield from (name for name in ("optimizer.pt", "scheduler.pt") if name not in names)
    count = sum(1 for name in names if _RANK_STREAMS.fullmatch(name))
    if "rng_state.pth" not in names:
        yield from (name for name in (f"rng_state_{rank}.pth" for rank in range(count)) if name not in names)
        if not count:
            yield "rng_state.pth"


def _left_out(name: str) -> str:
    if name == "training_args.bin":
        return "training_args.bin: a pickle of Hugging Face's own classes, never opened. Give the arguments again"
    return f"{name}: nothing that is restored"


def _weights(path: Path, names: list[str], files: Files, taken: set[str]) -> Iterator[tuple[str, Part]]:
    found = next((name for name in _WEIGHTS if name in names), None)
    if found is None:
        raise FormatError(f"{path} is incomplete: it has no weights (model.safetensors, an index of them, …)")
    component, load = _WEIGHTS[found]
    entries = load(path / found, files)
    taken.update(name for name in names if name.startswith(found.partition(".")[0]) and name.endswith(_OF_WEIGHTS))
    yield component, module(entries)


_OF_WEIGHTS = (".safetensors", ".bin", ".index.json")


def _bin(path: Path, files: Files) -> Tensors:
    tree = torch_file.load(files.open(path).whole())
    if not isinstance(tree, dict):
        raise FormatError(f"{path} holds no weights by name")
    return tree


_WEIGHTS: dict[str, tuple[str, Callable[[Path, Files], Tensors]]] = {
    "model.safetensors": ("model", safetensors_file.tensors),
    "model.safetensors.index.json": ("model", safetensors_file.indexed),
    "pytorch_model.bin": ("model", _bin),
    "adapter_model.safetensors": ("adapter", safetensors_file.tensors),
    "adapter_model.bin": ("adapter", _bin),
}


def _streams(path: Path, names: list[str], files: Files, parts: dict[str, Part], taken: set[str]) -> Iterator[str]:
    """Add the random streams; say what cannot be used of them."""
    if "rng_state.pth" in names:
        taken.add("rng_state.pth")
        tree = torch_file.load(files.open(path / "rng_state.pth").whole())
        part = streams(tree)
        if part is None:
            raise FormatError(f"{path / 'rng_state.pth'} does not hold random streams as the Trainer saves them")
        parts["rng"] = part
    ranks = [name for name in names if _RANK_STREAMS.fullmatch(name)]
    if ranks:
        taken.update(ranks)
        yield f"{', '.join(ranks)}: random streams of {len(ranks)} processes, which an import by one cannot give back"


def _trainer_state(path: Path, names: list[str], files: Files, parts: dict[str, Part], taken: set[str]) -> int | None:
    """Add the Trainer's own state; return the step."""
    numbered = _NUMBERED.fullmatch(path.name)
    if TRAINER_STATE not in names:
        if numbered or any(name in names for name in _STATES):
            raise FormatError(f"{path} is incomplete: {TRAINER_STATE}, which the Trainer writes last, is missing")
        return None
    taken.add(TRAINER_STATE)
    state = read_json(path / TRAINER_STATE, files)
    step = state.get("global_step")
    if type(step) is not int or step < 0:
        raise FormatError(f"{path / TRAINER_STATE} has no global_step")
    if numbered and int(numbered[1]) != step:
        raise FormatError(f"{path} is called after step {numbered[1]}, but its {TRAINER_STATE} is of step {step}")
    parts["trainer_state"] = guessed(state)
    return step


def read_json(path: Path, files: Files) -> dict[str, Any]:
    """The JSON object at *path*; NaN is let pass, as Hugging Face writes it. Raises FormatError."""
    try:
        tree = json.loads(files.read(path, limit=MAX_JSON_NBYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is damaged or cut off: it is no JSON ({error})") from error
    if not isinstance(tree, dict):
        raise FormatError(f"{path} holds no JSON object")
    return tree


def write(source: StoredCheckpoint, path: Path, wanted: Wanted) -> Exported:
    """
    A directory that ``from_pretrained`` loads: weights, sharded where they are large, and the configuration.

    Weights that are tied in the checkpoint are written under each of their names: a model that ties them finds them
    equal, and one that does not finds them all.
    """
    component = _module_of(source)
    configs = _configs(source, wanted)
    tree = source.tree(component)["entries"]
    entries = {name: one for name, one in tree.items() if isinstance(one, StoredTensor)}
    odd = next((name for name, one in entries.items() if one.dtype not in safetensors_file.NATIVE), None)
    if odd is not None:
        raise UnsupportedState(
            f"{component}.{odd} is of {entries[odd].dtype}, which safetensors does not have", path=odd
        )
    with placed(path) as temporary:
        new_folder(temporary)
        nbytes = _write_weights(temporary, entries, source, wanted.shard_nbytes)
        for name, config in configs.items():
            nbytes += _write_json(temporary / name, config)
    left_out = [
        f"{name}: only weights and configuration go into such a directory"
        for name in source.components
        if name not in (component, CONFIG)
    ]
    left_out += [f"{component}.{name}: no tensor" for name in tree if name not in entries]
    return Exported(
        checkpoint=source.checkpoint,
        path=path,
        nbytes=nbytes,
        components=(component,),
        left_out=(*left_out, *source.left_out),
    )


def _module_of(source: StoredCheckpoint) -> str:
    modules = [name for name in source.components if source.kind(name) == "module"]
    if len(modules) == 1:
        return modules[0]
    if "model" in modules:
        return "model"
    raise ValueError(f"which component holds the weights? There are {', '.join(modules) or 'no modules'}: name one")


def _configs(source: StoredCheckpoint, wanted: Wanted) -> dict[str, Any]:
    configs: dict[str, Any] = {}
    if CONFIG in source.manifest.components and source.kind(CONFIG) == "container":
        tree = source.tree(CONFIG)
        if isinstance(tree, dict) and all(isinstance(value, dict) for value in tree.values()):
            configs = {name: tree[name] for name in _CONFIGS if name in tree}
    if wanted.config is not None:
        with Files() as files:
            configs[CONFIG_FILE] = read_json(wanted.config, files)
    if CONFIG_FILE not in configs:
        raise ValueError("the checkpoint has no config.json, without which from_pretrained loads nothing: give one")
    return configs


def _write_weights(
    folder: Path, entries: Mapping[str, StoredTensor], source: StoredCheckpoint, shard_nbytes: int
) -> int:
    shards = list(_shards(entries, shard_nbytes))
    source.expected_nbytes = total = sum(one.nbytes for one in entries.values())
    written = 0
    weights: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with new_file(folder / name) as out:
            named = [(key, entries[key]) for key in names]
            written += safetensors_file.write_file(out, named, source, {"format": "pt"})
        weights.update(dict.fromkeys(names, name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        written += _write_json(folder / "model.safetensors.index.json", index)
    return written


def _shards(entries: Mapping[str, StoredTensor], shard_nbytes: int) -> Iterator[list[str]]:
    """The names of the tensors of every file: as many as fit, one at least."""
    shard: list[str] = []
    nbytes = 0
    for name, one in entries.items():
        if shard and nbytes + one.nbytes > shard_nbytes:
            yield shard
            shard, nbytes = [], 0
        shard.append(name)
        nbytes += one.nbytes
    yield shard


def _write_json(path: Path, tree: Any) -> int:
    data = (json.dumps(tree, indent=2) + "\n").encode()
    with new_file(path) as out:
        out.write(data)
    return len(data)
