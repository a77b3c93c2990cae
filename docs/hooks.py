"""What mkdocs calls while it builds the site: adds the pages of docs/pages.py, and cleans up how text is shown."""

from __future__ import annotations

import re
from typing import Any

import pages
from mkdocs.structure.files import File, Files

# Roles of Sphinx in docstrings, and what is left of them after Markdown.
ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|exc):<code>~?")


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for every method and package, and puts them into the navigation."""
    made = {path: make() for path, make in pages.generated().items()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    config.nav = [filled(entry, list(made)) for entry in config.nav]
    return files


def filled(entry: Any, made: list[str]) -> Any:
    """A part of the navigation with every ``methods/*`` and ``api/*`` replaced by the pages that were made."""
    if isinstance(entry, dict):
        return {title: filled(inside, made) for title, inside in entry.items()}
    if isinstance(entry, list):
        parts = [filled(inside, made) for inside in entry]
        return [one for part in parts for one in (part if isinstance(part, list) else [part])]
    if isinstance(entry, str) and entry.endswith("/*"):
        return [path for path in made if path.startswith(entry[:-1])]
    return entry


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The long page of all methods becomes a table here; cards that a method's page contains are not searched twice."""
    path = page.file.src_uri
    if path == "methods.md":
        return pages.overview(markdown)
    if path == "api/index.md":
        # Those pages are on the site alone.
        for package in pages.PACKAGES:
            markdown = markdown.replace(f"| `{package}` |", f"| [{package}]({package}.md) |")
    shared = {f"cards/{pages.card_of(name)}.md" for name in pages.METHODS}
    if path in shared:
        page.meta["search"] = {"exclude": True}
    # A folder is a page on GitHub and none here.
    return markdown.replace("](cards/)", "](cards/edm-pickles.md)")


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """References in docstrings without the marks of Sphinx, and spreads that stay on one line."""
    return ROLE.sub("<code>", html).replace(" +- ", "&nbsp;±&nbsp;")
