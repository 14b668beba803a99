"""``ckptman show``: what is in one checkpoint."""

from __future__ import annotations

import json

import click

from ckptman.cli._arguments import Step, json_option, root_argument
from ckptman.cli._documents import checkpoint_document
from ckptman.cli._render import age, count, print_json, print_text, printable, size, table
from ckptman.cli._values import pretty, readable
from ckptman.cli.ls import metrics_text
from ckptman.format.manifest import Manifest, Tensor
from ckptman.repository.repository import Repository, find
from ckptman.storage.base import Storage
from ckptman.types import Checkpoint


@click.command(short_help="Tensors, sizes and values of one.")
@root_argument()
@click.argument("step", metavar="[STEP]", type=Step(), default="latest")
@json_option
def show(storage: Storage, step: int | str, *, as_json: bool) -> None:
    """Show the tensors, sizes and values of the checkpoint STEP (default: the latest). Reads its manifest only."""
    repository = Repository(storage)
    entry = find(repository.entries(), step, storage.url)
    checkpoint, manifest = repository.checkpoint(entry), repository.manifest(entry)
    if as_json:
        print_json(_document(checkpoint, manifest))
    else:
        _print(checkpoint, manifest)


def _document(checkpoint: Checkpoint, manifest: Manifest) -> dict[str, object]:
    return {
        **checkpoint_document(checkpoint),
        "preempted": checkpoint.preempted,
        "components": {name: component.kind for name, component in manifest.components.items()},
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "nbytes": tensor.nbytes,
                "file": _files_of(tensor, manifest)[0] if tensor.chunks else None,
            }
            for tensor in manifest.tensors
        ],
        "aliases": manifest.aliases,
        "values": {name: json.loads(bytes(component.values)) for name, component in manifest.components.items()},
        "files": [{"path": file.path, "nbytes": file.nbytes} for file in manifest.files],
        "environment": manifest.environment,
    }


def _files_of(tensor: Tensor, manifest: Manifest) -> list[str]:
    return [manifest.files[number].path for number in tensor.files]


def _print(checkpoint: Checkpoint, manifest: Manifest) -> None:
    facts = {
        "step": str(checkpoint.step),
        "saved": f"{checkpoint.created_at:%Y-%m-%d %H:%M:%S} UTC ({age(checkpoint.created_at)})",
        "size": f"{size(checkpoint.nbytes)} in {count(len(manifest.tensors), 'tensor')}, "
        f"{size(checkpoint.new_nbytes)} of it written by this save",
        "metrics": metrics_text(checkpoint),
        "tags": ", ".join(checkpoint.tags),
        "ranks": str(checkpoint.world_size) if checkpoint.world_size > 1 else "",
        "preempted": "yes" if checkpoint.preempted else "",
        "folder": checkpoint.url,
        **manifest.environment,
    }
    for name, value in facts.items():
        if value:
            print_text(f"{printable(name):<10} {printable(value)}")
    print_text("")
    table(["component", "kind", "tensors>", "size>"], [_component_row(name, manifest) for name in manifest.components])
    if manifest.tensors:
        print_text("")
        table(
            ["tensor", "dtype", "shape", "size>", "file"],
            [_tensor_row(tensor, manifest) for tensor in manifest.tensors],
        )
    _print_values(manifest)


def _component_row(name: str, manifest: Manifest) -> list[str]:
    own = [tensor for tensor in manifest.tensors if tensor.name.startswith(f"{name}/")]
    return [name, manifest.components[name].kind, str(len(own)), size(sum(tensor.nbytes for tensor in own))]


def _tensor_row(tensor: Tensor, manifest: Manifest) -> list[str]:
    files = [path.removeprefix(f"{manifest.attempt}/") for path in _files_of(tensor, manifest)]
    more = f" +{len(files) - 1}" if len(files) > 1 else ""
    tied = [alias for alias, name in manifest.aliases.items() if name == tensor.name]
    return [
        " = ".join([tensor.name, *tied]),
        tensor.dtype,
        " × ".join(map(str, tensor.shape)) or "scalar",
        size(tensor.nbytes),
        f"{files[0]}{more}" if files else "",
    ]


def _print_values(manifest: Manifest) -> None:
    for name, component in manifest.components.items():
        value = readable(component.values)
        if value not in (None, {}, []):
            print_text(f"\n{name}: {printable(pretty(value))}")
