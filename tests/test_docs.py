"""The pages of docs/ and the README: what they link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    found = LINK.findall(page.read_text())
    lost = [to for to in found if "://" not in to and not (page.parent / to).exists()]
    assert not lost, f"{page.name} links to {lost}"


def test_a_lost_link_is_found() -> None:
    assert LINK.findall("see [a](b/c.md#d) and ![e](f.png)") == ["b/c.md", "f.png"]
