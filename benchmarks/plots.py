"""One SVG per question, by hand: bars with their spread, and the floor as a line. Its colours follow light and dark."""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

from benchmarks.figures import Median, lowest, summarise, values_of
from benchmarks.harness import Answer, Column, Question
from benchmarks.units import unit_for

WIDTH, LEFT, RIGHT = 760, 266, 96
ROW, BAR, TITLE, MARGIN = 26, 14, 50, 20
HEAD, HEAD_WITH_FLOOR, FOOT = 26, 46, 14

STYLE = """
  svg { color-scheme: light dark }
  text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328 }
  .title { font-size: 15px; font-weight: 600 }
  .panel, .value { fill: #59636e }
  .halo { stroke: #ffffff; stroke-width: 5; stroke-linejoin: round }
  .panel { font-weight: 600 }
  .ours { font-weight: 600 }
  .card { fill: #ffffff; stroke: #d1d9e0 }
  .bar { fill: #a9b4c0 }
  .bar.ours { fill: #0969da }
  .spread { stroke: #1f2328; stroke-width: 1.4; opacity: .6 }
  .floor { stroke: #bc4c00; stroke-width: 1.5; stroke-dasharray: 4 3 }
  .floor-label { fill: #bc4c00; font-size: 12px }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .panel, .value { fill: #9198a1 }
    .halo { stroke: #0d1117 }
    .card { fill: #0d1117; stroke: #3d444d }
    .bar { fill: #545d68 }
    .bar.ours { fill: #4493f8 }
    .spread { stroke: #f0f6fc }
    .floor { stroke: #f0883e }
    .floor-label { fill: #f0883e }
  }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """What one column of a question looks like: bars, shortest first, and a floor."""

    column: Column
    bars: tuple[tuple[str, Median], ...]
    floor: Median | None

    @property
    def head(self) -> float:
        return HEAD if self.floor is None else HEAD_WITH_FLOOR

    @property
    def height(self) -> float:
        return self.head + ROW * len(self.bars) + FOOT

    @property
    def largest(self) -> float:
        return max([*(m.high for _, m in self.bars), self.floor.median if self.floor else 0.0, 1e-12])


def plot(question: Question, answer: Answer) -> str:
    """The SVG of *answer*: a panel for each column that is to be plotted and was measured."""
    panels = [panel for column in question.columns if column.is_plotted and (panel := _panel(question, answer, column))]
    height = TITLE + sum(panel.height for panel in panels) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        f'role="img" aria-label="{escape(question.asks)}">',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="6"/>',
        _text(question.asks, MARGIN, 30, "title"),
    ]
    top = float(TITLE)
    for panel in panels:
        parts += _draw(panel, top)
        top += panel.height
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(question: Question, answer: Answer, column: Column) -> Panel | None:
    medians = {
        name: summarise(values)
        for name in question.contestants
        if (values := values_of(answer.repetitions, name, column.field)) and not name.startswith("floor")
    }
    if not medians:
        return None
    bars = sorted(medians.items(), key=lambda item: item[1].median)
    return Panel(column=column, bars=tuple(bars), floor=_floor(answer, column))


def _floor(answer: Answer, column: Column) -> Median | None:
    if not column.floors:
        return None
    floors = [lowest(one, column.floors, column.floor_field or column.field) for one in answer.repetitions]
    found = [value for value in floors if value is not None]
    return summarise(found) if found else None


def _draw(panel: Panel, top: float) -> list[str]:
    per_unit = (WIDTH - LEFT - RIGHT) / panel.largest
    unit = unit_for(panel.column.field, [median.median for _, median in panel.bars])
    tops = [top + panel.head + number * ROW for number in range(len(panel.bars))]
    parts = [_text(panel.column.title.replace("`", ""), MARGIN, top + 18, "panel")]
    for at, (name, median) in zip(tops, panel.bars, strict=True):
        parts += _bar(name, median, per_unit, at)
    if panel.floor is not None:
        x = LEFT + max(0.0, panel.floor.median) * per_unit
        parts += _floor_line(x, tops[0], tops[-1] + ROW, f"floor {unit.text(panel.floor.median)}")
    for at, (name, median) in zip(tops, panel.bars, strict=True):
        parts += _labels(name, median, per_unit, at, unit.text(median.median))
    return parts


def _bar(name: str, median: Median, per_unit: float, top: float) -> list[str]:
    middle = top + ROW / 2
    low, at, high = (max(0.0, number) * per_unit for number in (median.low, median.median, median.high))
    return [
        f'<rect class="bar {_whose(name)}" x="{LEFT}" y="{middle - BAR / 2:g}" '
        f'width="{max(at, 1):.1f}" height="{BAR}"/>',
        f'<line class="spread" x1="{LEFT + low:.1f}" x2="{LEFT + high:.1f}" y1="{middle:g}" y2="{middle:g}"/>',
    ]


def _floor_line(x: float, top: float, bottom: float, label: str) -> list[str]:
    anchor = "end" if x > WIDTH / 2 else "start"
    return [
        f'<line class="floor" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 8:g}" y2="{bottom:g}"/>',
        _text(label, x, top - 13, "floor-label", anchor),
    ]


def _labels(name: str, median: Median, per_unit: float, top: float, value: str) -> list[str]:
    baseline = top + ROW / 2 + 4.5
    end = LEFT + max(0.0, median.high) * per_unit
    return [
        _text(name, LEFT - 10, baseline, _whose(name), "end"),
        _text(
            value, end + 8, baseline, "halo"
        ),  # keeps the floor's line out of the number; paint-order is not everywhere
        _text(value, end + 8, baseline, "value"),
    ]


def _whose(name: str) -> str:
    return "ours" if name.startswith("ckptman") else "theirs"


def _text(text: str, x: float, y: float, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
