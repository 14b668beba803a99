"""The drawings of ``ckptman report``, as SVG by hand. Colours come from the page's style, in light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from ckptman.cli._render import printable, size
from ckptman.format.manifest import Manifest
from ckptman.types import Checkpoint

WIDTH = 920
_LEFT, _TOP, _PLOT, _FOOT = 84, 16, 150, 44
_MAX_LABELS = 12
_MAX_CELLS = 240
_HUES = 6


def timeline(checkpoints: Sequence[Checkpoint]) -> str:
    """A bar for every checkpoint, oldest commit first: all its bytes, and in strong colour those that it wrote."""
    top = max((one.nbytes for one in checkpoints), default=0) or 1
    pitch = (WIDTH - _LEFT) / max(len(checkpoints), 1)
    width = max(1.0, min(pitch * 0.7, 56))
    parts = [_axis(0, top, lambda nbytes: size(round(nbytes)))]
    for index, one in enumerate(checkpoints):
        middle = _LEFT + (index + 0.5) * pitch
        written = f"{size(one.nbytes)}, {size(one.new_nbytes)} new"
        about = f"step {one.step}, {one.created_at:%Y-%m-%d %H:%M:%S} UTC\n{written}"
        parts.append(f"<g><title>{_text(about + _tags(one))}</title>")
        for kind, nbytes in (("all", one.nbytes), ("new", one.new_nbytes)):
            height = _PLOT * nbytes / top
            parts.append(_rect(f"bar {kind}", middle - width / 2, _TOP + _PLOT - height, width, height))
        if one.tags:
            parts.append(f'<circle class="tag" cx="{middle:.1f}" cy="{_TOP - 7}" r="4"/>')
        parts.append("</g>")
        if _is_labelled(index, len(checkpoints)):
            parts.append(_label(str(one.step), middle, _TOP + _PLOT + 17, "middle"))
            parts.append(_label(f"{one.created_at:%m-%d %H:%M}", middle, _TOP + _PLOT + 33, "middle", "small"))
    return _svg(_TOP + _PLOT + _FOOT, parts)


def metric(name: str, checkpoints: Sequence[Checkpoint]) -> str:
    """The metric *name* over the steps, in the order of commits; where it is not finite, the line has a gap."""
    points = [(one.step, one.metrics[name]) for one in checkpoints if name in one.metrics]
    finite = [value for _, value in points if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if low == high:
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    parts = [_axis(low, high, lambda value: f"{value:.4g}")]
    run: list[str] = []
    for step, value in [*points, (last, math.nan)]:
        if math.isfinite(value):
            x = _LEFT + 12 + (WIDTH - _LEFT - 24) * ((step - first) / (last - first) if last > first else 0.5)
            y = _TOP + _PLOT * (high - value) / (high - low)
            run.append(f"{x:.1f},{y:.1f}")
            about = f"<title>step {step}: {value!r}</title>"
            parts.append(f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="3">{about}</circle>')
        elif run:
            parts.append(f'<polyline class="line" points="{" ".join(run)}"/>')
            run = []
    parts.append(_label(f"step {first}", _LEFT + 12, _TOP + _PLOT + 17, "start"))
    if last > first:
        parts.append(_label(f"step {last}", WIDTH - 12, _TOP + _PLOT + 17, "end"))
    return _svg(_TOP + _PLOT + 26, parts)


Cell = tuple[str, int, str, int]


def tensor_map(manifest: Manifest) -> str:
    """The tensors of a checkpoint as areas, in proportion to their bytes, in one colour for each component."""
    hues = {name: index % _HUES for index, name in enumerate(manifest.components)}
    largest = sorted((one for one in manifest.tensors if one.nbytes), key=lambda one: -one.nbytes)
    cells: list[Cell] = [
        (one.name, one.nbytes, f"{one.dtype} {' × '.join(map(str, one.shape)) or 'scalar'}", hues[_component(one.name)])
        for one in largest[:_MAX_CELLS]
    ]
    rest = largest[_MAX_CELLS:]
    if rest:
        cells.append((f"{len(rest)} smaller ones", sum(one.nbytes for one in rest), "", _HUES))
    height = 380.0
    parts = []
    for (name, nbytes, kind, hue), (x, y, w, h) in zip(cells, _squares([c[1] for c in cells], height), strict=True):
        share = nbytes / max(manifest.nbytes, 1)
        about = "\n".join((name, kind, f"{size(nbytes)}, {share:.1%}"))
        parts.append(f"<g><title>{_text(about)}</title>")
        parts.append(_rect(f"cell hue{hue}", x, y, max(w - 1, 0.3), max(h - 1, 0.3)))
        room = int((w - 10) / 7.6)  # characters, in the widest of the usual fonts
        if h > 20 and room >= 6:
            short = name if len(name) <= room else f"…{name[-(room - 1) :]}"
            parts.append(_label(short, x + 6, y + 16, "start", "cell-name"))
            if h > 38:
                parts.append(_label(size(nbytes), x + 6, y + 33, "start", "cell-size"))
        parts.append("</g>")
    return _svg(height, parts)


def legend(manifest: Manifest) -> Mapping[str, int]:
    """Component → the number of its colour, for those that have tensors."""
    used = {_component(one.name) for one in manifest.tensors if one.nbytes}
    return {name: index % _HUES for index, name in enumerate(manifest.components) if name in used}


def _component(tensor: str) -> str:
    return tensor.partition("/")[0]


Area = tuple[float, float, float, float]


def _squares(weights: Sequence[int], height: float) -> list[Area]:
    """Areas in proportion to *weights* (largest first) that fill the drawing, each as square as its row allows."""
    areas: list[Area] = []
    x, y, w, h = 0.0, 0.0, float(WIDTH), height
    left, index = float(sum(weights)), 0
    while index < len(weights):
        side = min(w, h)
        scale = w * h / left
        row = _row([weight * scale for weight in weights[index:]], side)
        total = sum(row)
        thickness, at = total / side, 0.0
        for area in row:
            length = area / thickness
            areas.append((x, y + at, thickness, length) if w >= h else (x + at, y, length, thickness))
            at += length
        if w >= h:
            x, w = x + thickness, max(w - thickness, 1e-6)
        else:
            y, h = y + thickness, max(h - thickness, 1e-6)
        left = max(left - total / scale, 1e-9)
        index += len(row)
    return areas


def _row(areas: Sequence[float], side: float) -> list[float]:
    """As many of *areas* as make the worst of them more square (Bruls, Huizing and van Wijk, 2000)."""
    row = [areas[0]]
    for area in areas[1:]:
        if _worst([*row, area], side) > _worst(row, side):
            break
        row.append(area)
    return row


def _worst(row: Sequence[float], side: float) -> float:
    total = sum(row)
    return max(side * side * max(row) / (total * total), total * total / (side * side * min(row)))


def _axis(low: float, high: float, text: Callable[[float], str]) -> str:
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = _TOP + _PLOT * (1 - share)
        value = low + (high - low) * share
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_label(text(value), _LEFT - 8, y + 4, "end", "small"))
    return "".join(parts)


def _is_labelled(index: int, count: int) -> bool:
    return index % max(1, math.ceil(count / _MAX_LABELS)) == 0


def _tags(one: Checkpoint) -> str:
    return f"\ntags: {', '.join(one.tags)}" if one.tags else ""


def _svg(height: float, parts: Sequence[str]) -> str:
    box = f'viewBox="0 0 {WIDTH} {height:.0f}" xmlns="http://www.w3.org/2000/svg"'
    return f'<svg {box} role="img">{"".join(parts)}</svg>'


def _rect(style: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _label(text: str, x: float, y: float, anchor: str, style: str = "label") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>'


def _text(text: str) -> str:
    return escape(printable(text))
