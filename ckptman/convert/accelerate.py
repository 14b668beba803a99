"""
Directories of accelerate's ``save_state``.

``sampler.bin`` is a pickle of accelerate's own classes: it is never opened.
"""

from __future__ import annotations

import re
from pathlib import Path

from ckptman.convert import safetensors_file, torch_file
from ckptman.convert.files import Files
from ckptman.convert.foreign import Foreign, Part, as_kind, guessed, module
from ckptman.convert.lightning import numbered
from ckptman.convert.streams import streams
from ckptman.errors import FormatError

_STREAMS = re.compile(r"random_states_[0-9]+\.pkl")
_FILE = re.compile(
    r"(?P<kind>model|pytorch_model|optimizer|scheduler|scaler|custom_checkpoint)(_(?P<index>[0-9]{1,3}))?"
    r"\.(?P<end>safetensors|safetensors\.index\.json|bin|pt|pkl)"
)
_COMPONENTS = {"pytorch_model": "model", "custom_checkpoint": "custom"}
_SHARD = re.compile(r"model(_[0-9]+)?-[0-9]{5}-of-[0-9]{5}\.safetensors")


def is_directory_of(path: Path) -> bool:
    """Whether *path* looks like a directory of accelerate."""
    return any(path.glob("random_states_*.pkl")) or (path / "optimizer.bin").exists()


def read(path: Path, files: Files) -> Foreign:
    """
    The components of the directory at *path*: ``model``, ``optimizer``, ``scheduler`` (further ones ``model-1``, …),
    ``scaler``, ``custom-1``, … and ``rng``. accelerate does not say which step it is of.

    Raises:
        FormatError: It is incomplete: no weights; or a file is damaged.
        UnsupportedState: A file would have to be unpickled.
    """
    parts: dict[str, Part] = {}
    left_out: list[str] = []
    names = sorted(entry.name for entry in path.iterdir())
    ranks = [name for name in names if _STREAMS.fullmatch(name)]
    for name in names:
        match = _FILE.fullmatch(name)
        if match is not None:
            kind = match["kind"]
            component = numbered(_COMPONENTS.get(kind, kind), int(match["index"] or 0))
            parts[component] = _part(component, path / name, files)
        elif name == "sampler.bin":
            left_out.append("sampler.bin: a pickle of accelerate's own classes, never opened. Give the seed again")
        elif name not in ranks and not _SHARD.fullmatch(name):
            left_out.append(f"{name}: nothing that is restored")
    if "model" not in parts:
        raise FormatError(f"{path} is incomplete: it has no weights (model.safetensors, an index of them, …)")
    missing = [f"{kind}.bin" for kind in ("optimizer", "scheduler") if f"{kind}-1" in parts and kind not in parts]
    if not ranks:
        missing.append("random_states_0.pkl")
    if len(ranks) == 1:
        parts["rng"] = _streams(path / ranks[0], files)
    elif ranks:
        left_out.append(
            f"{', '.join(ranks)}: random streams of {len(ranks)} processes, which an import by one cannot give back"
        )
    return Foreign(format="a directory of accelerate", parts=parts, left_out=tuple(left_out), missing=tuple(missing))


def _part(component: str, path: Path, files: Files) -> Part:
    if path.name.endswith(safetensors_file.INDEX):
        return module(safetensors_file.indexed(path, files))
    if path.name.endswith(".safetensors"):
        return module(safetensors_file.tensors(path, files))
    tree = torch_file.load(files.open(path).whole())
    if component.startswith("custom"):
        return guessed(tree)
    try:
        return as_kind(tree, "module" if component.startswith("model") else "stateful")
    except ValueError as error:
        raise FormatError(f"{path} does not hold the state of a {component}: {error}") from error


def _streams(path: Path, files: Files) -> Part:
    part = streams(torch_file.load(files.open(path).whole()))
    if part is None:
        raise FormatError(f"{path} does not hold random streams as accelerate saves them")
    return part
