"""The page of one training run: how far it is, whether it is healthy, and what its samples looked like on the way.

A finished run's page is one file that asks for nothing. While a run trains, or is followed, the page asks for a small
script beside it every few seconds, which is the way that browsers leave open to pages from disk; the script holds the
whole content anew. docs/run-page.md tells more.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from PIL import Image

from fewstep.core.state import LOG, write_text
from fewstep.report.run_charts import sections
from fewstep.report.run_view import RunView, clock, flat, now_of, read_run, size, span
from fewstep.report.table import show
from fewstep.train.health import SPREADS
from fewstep.train.monitor import FILE, LOOKS, REFERENCE, sheets

PAGE = "run.html"
# Sheets beside each other, and bytes that all of them together may add to a page.
SHEETS, BYTES = 12, 1_000_000
# Live pages: seconds between updates at the least, and the share of the time that updates may take at the most.
PAUSE, SHARE = 2.0, 0.004
# Milliseconds after which an open page asks again.
ASKS = 2000
WORDS = {"running": "Running", "finished": "Finished", "stopped": "Stopped", "silent": "Silent"}
HEADLINES = {"bad": "Something is wrong.", "warn": "Worth a look.", "good": "Healthy.", "none": "No trouble so far."}


def write_run_page(folder: Path, out: Path | None = None, *, now: float | None = None) -> Path:
    """Writes the page of the run in ``folder`` as it is now, with its pictures inside, and returns its path.

    ``out`` is ``run.html`` in the folder without one; ``now``, in seconds since 1970, is when silence is judged.

    Raises:
        InputError: the folder is no run, a file of it is damaged, or the place cannot be written.
    """
    out = Path(folder) / PAGE if out is None else Path(out)
    write_text(out, _clean(render(read_run(folder), out, now=now)))
    return out


class Live:
    """A page that follows a run while it is open.

    Args:
        folder: of the run.
        out: the page; ``run.html`` in the folder without one. Beside it lies a script of the same name with the newest
            content.
        share: of the time that may be spent on updates.
    """

    def __init__(self, folder: Path, out: Path | None = None, *, share: float = SHARE) -> None:
        self.folder = Path(folder)
        self.out = self.folder / PAGE if out is None else Path(out)
        self.script = self.out.with_suffix(".js")
        self.share, self.next, self.begun = share, 0.0, False

    def update(self) -> bool:
        """Writes the newest content where it is time for that; says whether it was.

        Raises:
            InputError: see :func:`write_run_page`.
        """
        started = time.monotonic()
        if started < self.next:
            return False
        view = read_run(self.folder)
        if not self.begun:
            write_text(self.out, _clean(render(view, self.out, live=self.script.name)))
        self._tell(view, live=True)
        ended = time.monotonic()
        # The first time loads what drawing needs, which says nothing about the times after it.
        cost = ended - started if self.begun else 0.0
        self.begun, self.next = True, ended + max(PAUSE, cost / self.share)
        return True

    def end(self) -> None:
        """Writes the page with everything in it, and lets those that are open ask no more.

        Raises:
            InputError: see :func:`write_run_page`.
        """
        view = read_run(self.folder)
        write_text(self.out, _clean(render(view, self.out)))
        self._tell(view, live=False)

    def _tell(self, view: RunView, *, live: bool) -> None:
        told = {
            "html": body(view, self.out, inline=False),
            "title": title(view),
            "live": live,
            "at": view.at,
            "patience": view.shown.patience(),
        }
        # JSON is JavaScript, and without letters beyond ASCII in any encoding.
        write_text(self.script, f"fewstepRun({json.dumps(told)});\n")


def follow(
    folder: Path,
    out: Path | None = None,
    *,
    pause: float = 1.0,
    say: Callable[[str], None] = lambda text: None,
    over: Callable[[], bool] = lambda: False,
) -> Path:
    """Keeps the page of a run up to date from another process, until the run has ended, or ``over()``, or Ctrl-C.

    ``pause`` seconds lie between looks at the folder; a tenth of the time is spent at most. ``say`` hears the page's
    place once it is there.

    Raises:
        InputError: see :func:`write_run_page`.
    """
    live, seen = Live(folder, out, share=0.1), -1
    try:
        while True:
            newest = _changed(Path(folder))
            if newest != seen and live.update():
                say(str(live.out)) if seen < 0 else None
                seen = newest
                view = read_run(folder)
                if view.state(now_of(view)) in ("finished", "stopped"):
                    break
            if over():
                break
            time.sleep(pause)
    except KeyboardInterrupt:
        # What is asked for with it is the end of following.
        pass
    live.end()
    return live.out


def _changed(folder: Path) -> int:
    """When something was last written to a run or its stages, in nanoseconds."""
    names = (LOG, FILE, "fewstep.json")
    files = [file for name in names for file in (folder / name, *folder.glob(f"stages/*/{name}"))]
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(resources.files("fewstep.report").joinpath(name).read_text("utf-8"))


def _clean(text: str) -> str:
    """Without halves of characters, as a broken file name may hold, which no encoding can write."""
    return text.encode("utf-8", "replace").decode()


def render(view: RunView, out: Path, *, live: str | None = None, now: float | None = None) -> str:
    """The page as text; ``live`` is the name of the script that it asks for, where it follows a run."""
    return _template("run.html.j2").render(
        title=title(view, now),
        body=body(view, out, inline=live is None, now=now),
        live=None if live is None else quote(live),
        at=json.dumps(view.at),
        patience=json.dumps(view.shown.patience()),
        asks=ASKS,
    )


def title(view: RunView, now: float | None = None) -> str:
    """The name of the page: how far the run is, and which it is."""
    state, name = view.state(now_of(view, now)), _name(view)
    share = f"{view.shown.progress():.0%} " if state == "running" else f"{WORDS[state]}: "
    return f"{share}{name}"


def _name(view: RunView) -> str:
    return f"{view.recipe.get('method', 'run')} in {view.folder.resolve().name}"


def body(view: RunView, out: Path, *, inline: bool, now: float | None = None) -> str:
    """What is inside the page, the same whether it is live or not.

    With ``inline`` pictures are inside; otherwise they are asked for at their place beside the page.
    """
    now = now_of(view, now)
    state = view.state(now)
    shown = view.shown
    findings = shown.findings()
    # Without a look that found them varied, nobody knows whether samples are healthy.
    order = ("bad", "warn", "none", "good")
    worst = min((f.level for f in findings), key=order.index)
    if state == "stopped" and worst in ("good", "none"):
        worst = "warn"
    return _template("run_body.html.j2").render(
        view=view,
        name=_name(view),
        state=state,
        word=WORDS[state],
        worst=worst,
        headline=HEADLINES[worst],
        why=shown.events[-1].get("why", "") if shown.events else "",
        silence=None if view.at is None else span(now - view.at),
        percent=100 * shown.progress(),
        tiles=list(_tiles(shown, now)),
        findings=findings,
        stages=[_stage(place, out, now) for place in view.stages],
        stage=shown.folder.name if view.stages else "",
        strip=_strip(shown, out, inline=inline),
        sections=[(t, about, charts) for t, about, charts in sections(shown) if charts],
        facts=_facts(view),
        settings=flat(view.recipe.get("settings") or {}),
        options=flat(view.recipe.get("options") or {}),
    )


def _tiles(view: RunView, now: float) -> Iterator[tuple[str, str, str]]:
    """What stands at the top: heading, value, small print."""
    last, budget = view.last, view.budget
    if last:
        of = f"of {budget.amount:,.0f}" if budget is not None and budget.unit == "steps" else ""
        if budget is not None and budget.unit == "images":
            of = f"{last.get('images', 0):,} of {budget.amount:,.0f} images"
        yield "Step", f"{last['step']:,}", of
    left = view.left()
    if left is not None and view.state(now) == "running":
        yield "Time left", span(left), f"done at about {clock((view.at or now) + left, now)}"
    if last:
        yield "Trained for", span(last["seconds"]), f"{last.get('images', 0):,} images"
    speeds = [v for _, v in view.speeds()]
    if speeds:
        newest = speeds[-max(1, len(speeds) // 10) :]
        yield "Speed", f"{show(sum(newest) / len(newest))} img/s", "pictures trained on"
    yield from _machine_tiles(view)


def _machine_tiles(view: RunView) -> Iterator[tuple[str, str, str]]:
    newest = view.reports[-1] if view.reports else {}
    if "device_memory" in newest:
        peak = f"at most {size(newest['device_peak'])}" if "device_peak" in newest else ""
        yield "Accelerator", size(newest["device_memory"]), peak
    if "memory" in newest:
        yield "Memory", size(newest["memory"]), "of the process"
    if "cores" in newest:
        load = f"busy; load {newest['load']:.3g}" if "load" in newest else "busy"
        yield "Processor", f"{newest['cores']:.2g} cores", load


def _stage(place: Path, out: Path, now: float) -> dict[str, Any]:
    view = read_run(place)
    state = view.state(now)
    page = place / PAGE
    return {
        "name": place.name,
        "method": view.recipe.get("method", ""),
        "state": WORDS[state],
        "percent": f"{view.progress():.0%}",
        "step": f"{view.last.get('step', 0):,}",
        "time": span(view.last.get("seconds", 0.0)),
        "href": _beside(page, out) if page.is_file() and page.resolve() != out.resolve() else "",
    }


def _beside(file: Path, out: Path) -> str:
    """A file's address as seen from the page."""
    return quote(os.path.relpath(file.resolve(), out.resolve().parent).replace(os.sep, "/"))


def _strip(view: RunView, out: Path, *, inline: bool) -> dict[str, Any] | None:
    """Sheets of samples from the same noise, newest first, behind what they are compared with."""
    found, looked = sheets(view.folder), True
    if not found:
        # Without looks there are at least the pictures of --grid-every.
        found, looked = sorted((view.folder / "samples").glob("[0-9]*.png")), False
    if not found:
        return None
    biggest = max(file.stat().st_size for file in found)
    chosen = _spread(found, max(2, min(SHEETS, int(BYTES * 3 / 4 / biggest))))
    looks = {int(e["step"]): e for e in view.entries if "health/variance" in e}
    reference = view.folder / LOOKS / f"{REFERENCE}.png"
    cards = []
    if looked and reference.is_file():
        told = str(view.facts.get("reference", "")).partition(" of ")[2]
        cards.append(_card(reference, out, inline, "Reference", told, ill=False))
    # The newest stands beside what it should look like.
    for file in reversed(chosen):
        step = int(file.stem)
        entry = looks.get(step, {})
        said = ", ".join(f"{k} {show(entry[f'health/{k}'])}" for k in ("variance", "modes") if f"health/{k}" in entry)
        cards.append(_card(file, out, inline, f"Step {step:,}" if step else "Start", said, ill="collapsed" in entry))
    return {"cards": cards, "looked": looked, "kept": len(found)}


def _spread(files: list[Path], count: int) -> list[Path]:
    """At most ``count`` of the files, with the first and the last, spread evenly over the steps in their names."""
    if len(files) <= count:
        return files
    steps = [int(file.stem) for file in files]
    wanted = [steps[0] + (steps[-1] - steps[0]) * k / (count - 1) for k in range(count)]
    near = {min(range(len(steps)), key=lambda i: abs(steps[i] - at)) for at in wanted}
    return [files[i] for i in sorted(near)]


def _card(file: Path, out: Path, inline: bool, head: str, said: str, *, ill: bool) -> dict[str, Any]:
    data = file.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}" if inline else _beside(file, out)
    return {"src": source, "width": width, "height": height, "head": head, "said": said, "ill": ill}


def _facts(view: RunView) -> dict[str, str]:
    """What the run is, in a table."""
    recipe = view.recipe
    given: dict[str, Any] = recipe.get("arguments") or {}
    budget = view.budget
    source, data = recipe.get("from"), recipe.get("data")
    facts = {
        "Folder": str(view.folder),
        "Method": str(recipe.get("method", "")),
        "Teacher": _printed(given.get("teacher"), source),
        "Data": _printed(given.get("data"), data) or "none",
        "Budget": f"{budget.amount:,.0f} {budget.unit}" if budget is not None else "",
        "Reference of the looks": view.facts.get("reference", ""),
        "Looks measure": ", ".join(f"{k}: {said}" for k, said in SPREADS.items()) if view.facts else "",
        "Made with": f"fewstep {recipe['fewstep']}" if "fewstep" in recipe else "",
        "Again": f"fewstep {recipe['command']} --recipe {view.folder / 'recipe.json'}" if "command" in recipe else "",
    }
    return {key: str(value) for key, value in facts.items() if value}


def _printed(name: str | None, fingerprint: str | None) -> str:
    """A name and a fingerprint, as far as there are any."""
    told = f"fingerprint {fingerprint}" if fingerprint else ""
    return f"{name} ({told})" if name and told else name or told
