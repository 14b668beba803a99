"""The table of what a resumed run gets back, in docs/how-to/integrations.md, is what runs show."""

import pytest
from killing import HOME

pytest.importorskip("torchdata")

from benchmarks.restored import COLUMNS, ROWS, row

PAGE = HOME / "docs" / "how-to" / "integrations.md"
MODULES = {"transformers": "transformers", "lightning": "lightning", "accelerate": "accelerate", "ignite": "ignite"}
QUICK = ("ignite", "plain")


def printed() -> dict[str, list[str]]:
    """The rows of the page's first table."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").partition("\n##")[0].splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert tuple(cells[0][1:]) == COLUMNS
    return {name: rest for name, *rest in cells[2:]}


def test_the_page_has_every_row() -> None:
    """No row is left out, and none is there that nobody measures."""
    assert list(printed()) == [name for name, _, _ in ROWS]


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if framework.__name__ in QUICK else pytest.mark.slow) for name, framework, _ in ROWS],
)
def test_a_row_is_what_is_measured(name: str) -> None:
    """Saved within an epoch, resumed in fresh objects with other seeds: every cell is as the page says."""
    framework, with_ckptman = next((one, ours) for other, one, ours in ROWS if other == name)
    pytest.importorskip(MODULES.get(framework.__name__, "torch"))
    found = row(framework, with_ckptman)
    assert [found[column] for column in COLUMNS] == printed()[name]
