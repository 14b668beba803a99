"""Documentation that runs: every Python block, every relative link, the two commands of the README."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ckptman
from ckptman import CheckpointManager, errors, events, keep

HOME = Path(__file__).parents[2]
PAGES = [HOME / "README.md", *sorted((HOME / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(HOME)) for page in PAGES]

# A page that gains or loses a block says so here; a pattern that stops matching fails.
BLOCKS = {
    "README.md": 2,
    "docs/tutorial/first-run.md": 2,
    "docs/how-to/many-ranks.md": 1,
    "docs/how-to/clusters.md": 2,
    "docs/how-to/resume.md": 6,
    "docs/how-to/retention.md": 3,
    "docs/how-to/recover-from-damage.md": 5,
    "docs/how-to/second-copy.md": 2,
    "docs/how-to/lightning.md": 2,
    "docs/how-to/accelerate.md": 1,
    "docs/how-to/ignite.md": 1,
    "docs/how-to/torchtitan.md": 1,
    "docs/how-to/convert.md": 1,
    "docs/reference/api.md": 2,
    "docs/reference/format.md": 1,
}
COMMANDS = [
    "python3 -m venv .venv && .venv/bin/pip install -q -c tests/constraints-cpu.txt -e '.[cli]'"
    " && .venv/bin/ckptman demo",
    "python3 -m venv .venv && .venv/bin/pip install -q -c tests/constraints-cpu.txt -e '.[test]'"
    " && .venv/bin/python -m pytest -n 3",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    language: str
    line: int
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of *page*, in their order."""
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(language=m[1], line=text[: m.start(2)].count("\n"), text=m[2]) for m in fences]


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def saved_root(root: Path) -> Path:
    """A root with a checkpoint of several kinds of components."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "progress": {"losses": [0.5, 0.25]}}
    with CheckpointManager(root, state) as manager:
        manager.save(1, metrics={"loss": 0.5}, block=True)
        manager.save(2, metrics={"loss": 0.25}, tags=["best"], block=True)
    return root


def test_the_pages_have_the_blocks_that_are_counted_here() -> None:
    """No Python block escapes the test below: each page has exactly as many as are listed."""
    found = {name: len(python_blocks(page)) for name, page in zip(NAMES, PAGES, strict=True)}
    assert {name: count for name, count in found.items() if count} == BLOCKS


@pytest.mark.parametrize("name", BLOCKS)
def test_every_python_block_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, run one after the other in an empty directory, do what the page says."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    namespace: dict[str, object] = {"__name__": "page"}
    if name == "docs/reference/format.md":
        namespace["root"] = saved_root(tmp_path / "root")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        warnings.filterwarnings("ignore", message="`torch.jit")  # ignite uses it on import
        for block in python_blocks(HOME / name):
            source = "\n" * block.line + block.text  # so that a traceback shows the page's own line
            exec(compile(source, str(HOME / name), "exec"), namespace)


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_resolves(name: str) -> None:
    """What a page links to within the project is there."""
    page = HOME / name
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target.partition("#")[0]).exists()]
    assert missing == []


def test_every_page_can_be_reached_from_the_index() -> None:
    """docs/index.md links to every other page of docs/."""
    index = HOME / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)\s]+)\)", index.read_text("utf-8"))}
    assert [
        name for name, page in zip(NAMES, PAGES, strict=True) if page not in {*linked, index, HOME / "README.md"}
    ] == []


def test_the_readme_has_exactly_the_two_commands() -> None:
    """The checks run the second one word for word, so both stand alone in a bash block of their own."""
    assert [block.text.strip() for block in blocks(HOME / "README.md") if block.language == "bash"] == COMMANDS


def test_everything_public_is_in_the_reference() -> None:
    """Every public name of the package, of its events and of its keep rules has its place in the reference."""
    pages = [(HOME / "docs" / "reference" / name).read_text("utf-8") for name in ("api.md", "errors.md")]
    events_ = [n for n, v in vars(events).items() if isinstance(v, type) and issubclass(v, events.Event)]
    rules = [f"keep.{name}" for name in ("everything", "last", "best", "every", "hours", "days")]
    assert all(hasattr(keep, rule.removeprefix("keep.")) for rule in rules)
    methods = [name for name in vars(CheckpointManager) if not name.startswith("_")]
    assert len(events_) == 10
    wanted = [*ckptman.__all__, *events_, *rules, *methods]
    assert [name for name in wanted if not re.search(rf"\b{re.escape(name)}\b", "\n".join(pages))] == []


def test_the_exit_codes_in_the_reference_are_the_real_ones() -> None:
    """The table of errors lists every class with the code that it has."""
    page = (HOME / "docs" / "reference" / "errors.md").read_text("utf-8")
    listed = {name: int(code) for name, code in re.findall(r"^\| `(\w+)` .* (\d+) \|$", page, re.MULTILINE)}
    real = {
        name: cls.exit_code
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, errors.CkptmanError)
    }
    assert listed == real
