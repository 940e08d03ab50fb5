"""Links of the README and completeness of the API reference."""

import re
from pathlib import Path

import pytest

import pixmim

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/pixmim/pixmim/blob/main/"
RAW = "https://raw.githubusercontent.com/pixmim/pixmim/main/"


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings as on GitHub."""
    headings = re.findall(r"(?m)^#+ (.*)", page.read_text())
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_readme_are_absolute_and_exist() -> None:
    text = (ROOT / "README.md").read_text()
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r"(?m)^\[[\w-]+\]: (\S+)", text)]
    assert len(links) > 30
    for link in links:
        if link.startswith("#"):
            assert link[1:] in _anchors(ROOT / "README.md"), link
            continue
        assert link.startswith("https://"), (
            f"{link} is not absolute, and a package index shows the README without other files"
        )
        for prefix in (REPOSITORY, RAW):
            if link.startswith(prefix):
                name, _, anchor = link.removeprefix(prefix).partition("#")
                assert (ROOT / name).is_file(), link
                assert not anchor or anchor in _anchors(ROOT / name), link
    defined, used = (set(re.findall(p, text)) for p in (r"(?m)^\[([\w-]+)\]: ", r"\]\[([\w-]+)\]"))
    assert defined == used


def test_the_api_reference_contains_each_public_name_once() -> None:
    names = re.findall(r"(?m)^::: pixmim\.(\w+)$", (ROOT / "docs" / "api.md").read_text())
    assert sorted(names) == sorted(pixmim.__all__)


def test_the_budget_of_a_large_run_is_as_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from budget import budget

    lines = "".join(f"    {line}\n" for line in budget("ViT-B/16"))
    assert lines in (ROOT / "docs" / "performance.md").read_text()
