"""``report``: one page that needs nothing else, runs nothing, and shows what is there."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from cli_roots import Run, everything

from ckptman import CheckpointManager


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.styles: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.styles.append(found.get("class") or "")
        self.links += [value or "" for name, value in attrs if name in ("href", "src") or name.startswith("on")]


def test_the_page_shows_what_is_there(run: Run, root: Path, tmp_path: Path) -> None:
    """A bar for each checkpoint, a line for each metric, an area for each tensor; and the root is not touched."""
    before = everything(root)
    document = run("report", root, "-o", tmp_path / "page.html", "--json").document
    assert document["checkpoints"] == 3
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.styles.count("bar all") == page.styles.count("bar new") == 3
    assert page.styles.count("tag") == 1
    assert page.styles.count("point") == 2  # the third loss is NaN
    assert page.styles.count("line") == 1
    assert len([style for style in page.styles if style.startswith("cell hue")]) == 3
    assert "first" in text
    assert "weights/same" in text
    assert everything(root) == before
    assert run("report", root, "-o", tmp_path / "page.html").code == 0  # replaced
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "root"]


def test_the_page_needs_and_runs_nothing(run: Run, tmp_path: Path) -> None:
    """No link, no script, whatever a metric is called; a thousand tensors are still one page."""
    evil = "<script>alert(1)</script>"
    state = {"w": {f"t{index}": torch.ones(1 + index % 7) for index in range(1000)}, "none": torch.zeros(0)}
    with CheckpointManager(tmp_path / "root", state) as manager:
        for step in range(12):
            manager.save(step, metrics={evil: step * 1.5, "constant": 1.0}, block=True)
    assert run("report", tmp_path / "root", "-o", tmp_path / "page.html").code == 0
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.links == []
    assert re.findall(r"url\(|@import|https?://(?!www\.w3\.org)", text) == []
    assert "&lt;script&gt;" in text
    assert "nan" not in re.sub(r"<title>.*?</title>", "", text).lower()
    assert "smaller ones" in text
    areas = [tuple(map(float, numbers)) for numbers in re.findall(
        r'class="cell hue\d" x="([\d.-]+)" y="([\d.-]+)" width="([\d.-]+)" height="([\d.-]+)"', text
    )]  # fmt: skip
    assert len(areas) == 241
    assert all(x >= 0 and y >= 0 and x + w <= 920.5 and y + h <= 380.5 for x, y, w, h in areas)
    assert sum((w + 1) * (h + 1) for _, _, w, h in areas) == pytest.approx(920 * 380, rel=0.05)


def test_what_cannot_be_reported(run: Run, root: Path, tmp_path: Path) -> None:
    """No checkpoint exits 3, a place that cannot be written 1; nothing is left."""
    assert run("report", tmp_path / "none", "-o", tmp_path / "page.html").code == 3
    assert run("report", root, "-o", tmp_path / "no" / "page.html").code == 1
    assert run("report", root).code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
