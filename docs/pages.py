"""Pages that exist on the site alone: one per method, and the reference of each package. docs/hooks.py asks for them.

Nothing slow is done here: roles, memory and settings of a method are taken from docs/methods.md, which ``make docs``
writes from the code, its numbers from benchmarks/results/, and what people wrote about it from docs/cards/.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from tables import CARDS, DOCS, RESULTS, spread, table

from fewstep.cli.methods import needs_data, steps_of
from fewstep.distill import METHODS

SECTION = re.compile(r"^## (?=\S)", re.MULTILINE)
LINK = re.compile(r"\]\((?![a-z]+:|#|/)([^)]+)\)")
PACKAGES = {
    "fewstep": "what most programs need",
    "fewstep.grid": "lists of noise levels",
    "fewstep.solve": "samplers, and fitting them",
    "fewstep.guide": "guidance",
    "fewstep.tracing": "other people's samplers as tables",
    "fewstep.sources": "opening teachers",
    "fewstep.data": "pictures",
    "fewstep.models": "networks",
    "fewstep.train": "training, and the objectives from data",
    "fewstep.distill": "methods",
    "fewstep.edit": "editing pictures",
    "fewstep.measure": "scores",
    "fewstep.serve": "the page of `fewstep serve`",
    "fewstep.export": "students out",
}


def sections(text: str) -> dict[str, str]:
    """The parts of a page by their headings of the second level, headings left out."""
    parts = [part.partition("\n") for part in SECTION.split(text)[1:]]
    return {name.strip(): body.strip() for name, _, body in parts}


def card_of(name: str) -> str | None:
    """The name of the hand-written card that a method shares with its relatives."""
    stem = METHODS[name].__module__.rpartition(".")[2].removesuffix("_training").replace("_", "-")
    stem = CARDS.get(stem, stem)
    return stem if (DOCS / "cards" / f"{stem}.md").is_file() else None


def moved(text: str, folder: str = "") -> str:
    """Markdown whose links started at ``docs/folder``, for a page in docs/methods/."""
    return LINK.sub(lambda found: f"](../{folder}{found[1]})".replace("cards/../", ""), text)


def lowered(text: str) -> str:
    """Markdown with every heading one level further down."""
    return re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE)


def measured(name: str) -> str:
    """The rows of a method with its defaults in every task, beside fitted samplers of as many evaluations."""
    parts = []
    for path in sorted(RESULTS.glob("methods-*.json")):
        body, task = json.loads(path.read_text()), path.stem.removeprefix("methods-")
        rows = [r for r in body["rows"] if "refused" not in r]
        own = [r for r in rows if r.get("method") == name]
        counts = {r["nfe"] for r in own}
        beside = [r for r in rows if r["name"] == "calibrated" and r["nfe"] in counts] if own else []
        metrics = [k for k, v in rows[0].items() if isinstance(v, list) and k != "seeds"]
        cells = [
            [r["name"], str(r["nfe"]), *(spread(r.get(m)) for m in metrics), str(r.get("cpu_seconds", ""))]
            for r in sorted(own + beside, key=lambda r: (r["nfe"], r["name"])) + rows[:1]
        ]
        if own:
            seeds = f"{body['settings']['samples']} pictures of each of the seeds {body['settings']['seeds']}"
            head = ["sampler", "NFE", *metrics, "CPU s of training"]
            parts.append(f"**{task}**, {seeds}:\n\n{table(head, cells)}")
    if not parts:
        return ""
    said = (
        "Short trainings, a few minutes of one core at most, on small teachers; what they mean and every other method: "
        "[Methods, measured](../methods-measured.md). `calibrated` is a fitted sampler, which trains nothing.\n\n"
    )
    return f"## Measured beside others\n\n{said}" + "\n".join(parts)


def method_page(name: str, section: str) -> str:
    """Everything about one method: its section of docs/methods.md, its numbers, and the card."""
    card = card_of(name)
    if card is not None:
        # It follows below.
        section = re.sub(r"^Measured in \[cards/.*$", "", section, flags=re.MULTILINE)
    parts = [f"# {name}", moved(section), measured(name)]
    if card is not None:
        parts.append(lowered(moved((DOCS / "cards" / f"{card}.md").read_text(), "cards/")))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def overview(text: str) -> str:
    """The page of all methods as a table that leads to theirs."""
    counts = {"any": "any", "chosen": "chosen before", "1": "1"}
    rows = []
    for name, section in sections(text).items():
        data = "yes" if needs_data(METHODS[name]) else "no"
        said = section.splitlines()[0].rstrip(".")
        rows.append([f"[{name}](methods/{name}.md)", said, data, counts[steps_of(METHODS[name])]])
    return (
        "# Methods\n\nWhat `fewstep distill METHOD` knows. Each page has the method's roles, memory, settings with "
        "their defaults and meanings, numbers and source, and what differs from the paper. "
        "[Methods, measured](methods-measured.md) puts them side by side; [Methods and roles](concepts/methods.md) "
        "says what they have in common.\n\n" + table(["method", "what it is", "data", "evaluations"], rows)
    )


def public(package: str) -> dict[str, Any]:
    """The public names of a package with their objects; packages among them are left out."""
    module = import_module(package)
    found = {name: getattr(module, name) for name in module.__all__}
    return {k: v for k, v in found.items() if not inspect.ismodule(v)}


def api_page(package: str, seen: dict[str, str]) -> str:
    """The reference of a package as directives of mkdocstrings.

    Args:
        package: its name.
        seen: definitions that other pages show, with the name there; those of this page are added.
    """
    shown, again, values = [], [], []
    for name, found in sorted(public(package).items(), key=lambda item: item[0].lower()):
        place = _definition(found)
        if place is None:
            values.append([f"`{name}`", _said(found)])
        elif place in seen:
            again.append(f"[`{name}`][{place}]")
        else:
            seen[place] = f"{package}.{name}"
            shown.append(f"::: {place}\n    options:\n      heading: {package}.{name}\n      toc_label: {name}\n")
    intro = inspect.getdoc(import_module(package)) or ""
    parts = [f"# {package}", intro, *shown]
    parts += [f"## Shown elsewhere\n\n{', '.join(again)}."] if again else []
    parts += [f"## Values\n\n{table(['name', 'what'], values)}"] if values else []
    return "\n\n".join(parts) + "\n"


def _definition(found: Any) -> str | None:
    """Where a class or function of fewstep is written; None for values."""
    if not (inspect.isclass(found) or inspect.isfunction(found)) or not found.__module__.startswith("fewstep"):
        return None
    return None if "<" in found.__qualname__ else f"{found.__module__}.{found.__qualname__}"


def _said(found: Any) -> str:
    """A value in a few words."""
    if isinstance(found, functools.partial):
        options = ", ".join(f"{k}={v!r}" for k, v in found.keywords.items())
        return f"`{found.func.__name__}` with {options}"
    if isinstance(found, dict | tuple | list):
        return ", ".join(f"`{key}`" for key in found)
    kind = type(found).__name__
    return f"a value: `{found!r}`" if len(repr(found)) < 100 and "0x" not in repr(found) else f"a value: {kind}"


def generated() -> dict[str, Callable[[], str]]:
    """What makes each page, by its path on the site."""
    made: dict[str, Callable[[], str]] = {}
    known = sections((DOCS / "methods.md").read_text())
    for name in METHODS:
        if name in known:
            made[f"methods/{name}.md"] = functools.partial(method_page, name, known[name])
    seen: dict[str, str] = {}
    for package in PACKAGES:
        made[f"api/{package}.md"] = functools.partial(api_page, package, seen)
    return made
