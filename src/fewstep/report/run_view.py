"""What is known of a run from its folder: how far it is, how long it still takes, and whether it looks healthy."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fewstep.core.generator import CONFIG
from fewstep.core.options import Budget
from fewstep.core.state import RECIPE, Run, read_json
from fewstep.errors import InputError
from fewstep.report.table import finite, show
from fewstep.train.health import FILE as HEALTH
from fewstep.train.health import LATE, history, measures_in
from fewstep.train.monitor import read_monitor

State = Literal["running", "finished", "stopped", "silent"]
Level = Literal["good", "warn", "bad", "none"]
# A run is taken for stopped when it has been silent for so many of its usual times between reports, and for a minute.
PATIENCE, LEAST = 8.0, 60.0
# Time left is told from this part of the run, because the first steps of many runs are slow.
RECENT = 0.3
# A gradient whose average grew by this much since the middle of the run is worth a look.
GROWN = 5.0
STAGES = "stages"
# Below this share of the reference's, samples are not called varied: students of one step start as a blur.
VARIED = 0.2


class Finding(NamedTuple):
    """Something that was found, and how bad it is; "none" is neither good nor bad."""

    level: Level
    said: str


@dataclass
class RunView:
    """A run as its folder tells it.

    Attributes:
        folder: of the run.
        recipe: its ``recipe.json``.
        entries: the log, with the start of the looks at step 0, see :func:`fewstep.train.health.history`.
        reports: the lines of ``monitor.jsonl`` that belong to reports.
        events: the others: started, resumed, stopped, finished.
        facts: of ``health.json``.
        stages: the folders of the stages of a run of several, oldest first.
    """

    folder: Path
    recipe: dict[str, Any]
    entries: list[dict[str, Any]]
    reports: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    stages: list[Path] = field(default_factory=list)

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The entries of the log itself."""
        return [e for e in self.entries if "seconds" in e]

    @cached_property
    def shown(self) -> RunView:
        """The run that has the curves: the newest stage of a run of several, or this one."""
        return read_run(self.stages[-1]) if self.stages else self

    @property
    def budget(self) -> Budget | None:
        """Of the recipe, where that has one."""
        told = (self.recipe.get("options") or {}).get("budget")
        return Budget(float(told["amount"]), str(told["unit"])) if isinstance(told, dict) else None

    @property
    def last(self) -> dict[str, Any]:
        """The newest entry of the log; empty before the first."""
        return self.log[-1] if self.log else {}

    @property
    def at(self) -> float | None:
        """When the run last said something, in seconds since 1970; None for runs that did not write that down."""
        if self.stages:
            return self.shown.at
        lines = [line["at"] for line in (*self.reports[-1:], *self.events[-1:]) if "at" in line]
        return max(lines, default=None)

    def progress(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
        if self.finished():
            return 1.0
        budget, last = self.budget, self.last
        if budget is None or not last:
            return 0.0
        return min(1.0, budget.progress(last["step"], last.get("images", 0), last["seconds"]))

    def finished(self) -> bool:
        """Whether the generator is there."""
        return (self.folder / CONFIG).is_file()

    def patience(self) -> float:
        """Seconds of silence after which the run is taken for stopped."""
        times = [line["at"] for line in self.reports[-21:] if "at" in line]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        return max(LEAST, PATIENCE * max(gaps, default=0.0))

    def state(self, now: float) -> State:
        """What the run is doing at the time ``now``, in seconds since 1970."""
        if self.finished():
            return "finished"
        events = self.shown.events
        if events and events[-1]["event"] == "stopped":
            return "stopped"
        at = self.at
        return "running" if at is not None and now - at < self.shown.patience() else "silent"

    def left(self) -> float | None:
        """Seconds that the rest of the budget takes at the present pace; None while nobody can tell."""
        budget, log = self.budget, self.log
        if budget is None or not log:
            return None
        if budget.unit == "seconds":
            return max(0.0, budget.amount - float(log[-1]["seconds"]))
        spent = [(float(e["seconds"]), budget.progress(e["step"], e.get("images", 0), 0.0)) for e in log]
        since = spent[-1][0] * (1 - RECENT)
        start = max((pair for pair in [(0.0, 0.0), *spent[:-1]] if pair[0] <= since), default=(0.0, 0.0))
        seconds, share = spent[-1][0] - start[0], spent[-1][1] - start[1]
        return max(0.0, (1 - spent[-1][1]) * seconds / share) if share > 0 and seconds > 0 else None

    def speeds(self) -> list[tuple[float, float]]:
        """(step, images per second) between reports."""
        pairs = itertools.pairwise([{"step": 0, "images": 0, "seconds": 0.0}, *self.log])
        found = [(b["step"], b.get("images", 0) - a.get("images", 0), b["seconds"] - a["seconds"]) for a, b in pairs]
        return [(float(step), images / seconds) for step, images, seconds in found if seconds > 0 and images > 0]

    def findings(self) -> list[Finding]:
        """What a person should know of the run's health, the samples first."""
        found = [self._samples(), *self._numbers()]
        for entry in self.facts.get("rollbacks", []):
            said = f"Rolled back from step {entry['collapsed']:,} to {entry['to']:,}: {entry['why']}; learning rates "
            found.append(Finding("warn", f"{said}times {entry['rates']:g}."))
        return found

    def _samples(self) -> Finding:
        looks = [e for e in self.log if measures_in(e) is not None]
        if not looks:
            return Finding("none", "Nobody has looked at the samples.")
        ill = [e for e in looks if "collapsed" in e]
        if "collapsed" in looks[-1]:
            return Finding(
                "bad", f"The samples have collapsed at step {looks[-1]['step']:,}: {looks[-1]['collapsed']}."
            )
        measured = measures_in(looks[-1]) or {}
        told = ", ".join(f"{key} {show(value)}" for key, value in measured.items())
        count = f"{len(looks)} look{'s' * (len(looks) > 1)}"
        if ill:
            said = f"{len(ill)} of {count} found a collapse, the last at step {ill[-1]['step']:,}"
            return Finding("warn", f"{said}; the newest did not: {told}, in units of the reference's.")
        spread = min((v for k, v in measured.items() if v is not None and k != "modes"), default=1.0)
        if spread < VARIED:
            late: Level = "warn" if self.progress() >= LATE else "none"
            return Finding(late, f"No collapse in {count}, but samples are alike still: {told} of the reference's.")
        return Finding("good", f"Samples are varied, no collapse in {count}: {told}, in units of the reference's.")

    def _numbers(self) -> list[Finding]:
        """Losses and gradients."""
        last = self.last
        if not last:
            return [Finding("none", "There is no report yet.")]
        found = []
        lost = [k for k, v in last.items() if k.endswith("/loss") and v is None]
        if lost:
            found.append(Finding("bad", f"Not finite in the newest report: {', '.join(lost)}."))
        if last.get("skipped"):
            updates = f"{last['skipped']:,} update{'s' * (last['skipped'] > 1)}"
            found.append(Finding("warn", f"{updates} skipped, because loss or gradient was not finite."))
        for key in sorted({k for e in self.log[-3:] for k in e if k.endswith("/grad_norm")}):
            norms = [v for e in self.log if (v := finite(e.get(key))) is not None]
            if len(norms) >= 20:
                half, tail = statistics.median(norms[: len(norms) // 2]), statistics.median(norms[-len(norms) // 10 :])
                if half > 0 and tail > GROWN * half:
                    name = key.partition("/")[0]
                    said = f"The gradient of {name} has grown {tail / half:.0f}-fold since the first half of the run."
                    found.append(Finding("warn", said))
        return found or [Finding("good", "Losses and gradients are finite, and no update was skipped.")]


def read_run(folder: Path) -> RunView:
    """A run from its folder; nothing in it needs to be there but the recipe.

    Raises:
        InputError: the folder is no run, or a file of it is damaged beyond a last line that a kill cut short.
    """
    folder = Path(folder)
    if not (folder / RECIPE).is_file():
        raise InputError(f"{folder} is not a run folder: it has no {RECIPE}")
    recipe, lines = read_json(folder / RECIPE), read_monitor(folder)
    facts = read_json(folder / HEALTH) if (folder / HEALTH).is_file() else {}
    entries = history(Run(folder))
    wrong = next((e for e in (*entries, *lines) if not isinstance(e, dict) or "step" not in e), None)
    if wrong is not None:
        raise InputError(f"{folder} has a log with {json.dumps(wrong)[:80]}, expected objects with a step: restore it")
    places = (folder / STAGES).iterdir() if (folder / STAGES).is_dir() else ()
    stages = [place for place in places if (place / RECIPE).is_file()]
    return RunView(
        folder,
        recipe,
        entries,
        [line for line in lines if "event" not in line],
        [line for line in lines if "event" in line],
        facts,
        sorted(stages, key=lambda place: ((place / RECIPE).stat().st_mtime, place.name)),
    )


def span(seconds: float) -> str:
    """A time that reads well: 45 s, 8 min, 2 h 5 min, 3 d 4 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"


def clock(at: float, now: float) -> str:
    """A time of day, with the date where it is another day's, in this machine's time zone."""
    then, today = datetime.fromtimestamp(at), datetime.fromtimestamp(now)
    return then.strftime("%H:%M" if then.date() == today.date() else "%d %b %H:%M")


def size(count: float) -> str:
    """Bytes as MB or GB, in powers of ten."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def flat(body: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by their dotted names, as text; what is None is left out."""
    found: dict[str, str] = {}
    for key, value in body.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[prefix + str(key)] = _plain(value)
    return found


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(v) for v in value)
    return str(value)


def now_of(view: RunView, now: float | None = None) -> float:
    """The time to judge a run at: now, or that of its last word where the clock is behind it."""
    given = time.time() if now is None else now
    return max(given, view.at or -math.inf)
