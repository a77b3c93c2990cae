"""``fewstep methods``: what can be distilled."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from fewstep.core.state import write_text
from fewstep.distill import METHODS
from fewstep.errors import unknown


@dataclass(frozen=True)
class Methods:
    """Lists the methods, or explains one.

    Attributes:
        name: a method, for its settings, defaults and source.
        markdown: writes the list as a Markdown page here.
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    markdown: Path | None = None

    def run(self) -> None:
        """Runs the command."""
        console = Console()
        if self.name is not None and self.name not in METHODS:
            raise unknown("method", self.name, METHODS)
        if self.markdown is not None:
            write_text(self.markdown, markdown())
            return
        if self.name is None:
            shown = Table("method", "data", "what it is")
            for name, method in METHODS.items():
                shown.add_row(name, "yes" if method.needs_data else "no", purpose(method))
            console.print(shown)
            return
        console.print(Markdown(card(self.name)))


def purpose(method: type) -> str:
    """The first line of the file that holds the method: its name and source."""
    return (inspect.getdoc(inspect.getmodule(method)) or "").splitlines()[0]


def card(name: str) -> str:
    """Purpose, settings, meanings and defaults of a method as Markdown."""
    method = METHODS[name]
    text, _, attributes = (inspect.getdoc(method) or "").partition("Attributes:")
    joined = re.sub(r"\n {2,}", " ", inspect.cleandoc(attributes))
    meanings = dict(re.findall(r"^ *(\w+): (.*)$", joined, re.MULTILINE))
    lines = [
        f"## {name}",
        "",
        purpose(method),
        "",
        text.strip(),
        "",
        "| setting | default | meaning |",
        "|---|---|---|",
    ]
    for key, value in asdict(method()).items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) if isinstance(value, dict) else value
        lines.append(f"| `{key}` | {shown} | {meanings.get(key, '')} |")
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """The page of all methods."""
    head = "# Methods\n\n"
    return head + "\n".join(card(name) for name in METHODS)
