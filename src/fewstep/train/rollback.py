"""What is done about a collapse: how often a run looks for one, and the way back to its last good checkpoint."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fewstep.core.options import FitOptions
from fewstep.core.role import Models
from fewstep.core.state import Run, read_json, write_text
from fewstep.errors import CollapseError, InputError, unknown
from fewstep.train.health import FILE, SAMPLES, measures_in

OnCollapse = Literal["stop", "rollback", "ignore"]
CHOICES = ("stop", "rollback", "ignore")
# Looks may cost this share of the training that they stand between, counted in evaluations.
SHARE = 0.02
ROLLBACKS = 3
SLOWER = 0.5


@dataclass(frozen=True)
class Watching:
    """What is done about collapse.

    Attributes:
        on_collapse: stop ends the run with a :class:`~fewstep.errors.CollapseError`; rollback goes on from the newest
            checkpoint that was still good, with learning rates halved, at most three times; ignore only logs it.
        every: steps between looks, rounded up to reports; 0 never looks; None chooses it so that looks cost at most two
            hundredths of the training, and none where the whole budget is shorter than that.

    Raises:
        InputError: another word, or a negative number.
    """

    on_collapse: OnCollapse = "stop"
    every: int | None = None

    def __post_init__(self) -> None:
        if self.on_collapse not in CHOICES:
            raise unknown("answer to a collapse", str(self.on_collapse), CHOICES)
        if self.every is not None and (isinstance(self.every, bool) or self.every < 0):
            raise InputError(f"check_every must be at least 0 (0 never checks), got {self.every!r}")

    def steps(self, options: FitOptions, models: Models, nfe: int) -> int:
        """Steps between looks, a multiple of ``log_every``; 0 where there are none.

        Nobody looks at what a method trains beside a student, such as a decoder, or a teacher that is to get worse.
        """
        every = self.every
        if every == 0 or not any(role.ships for name, role in models.roles.items() if name == "student"):
            return 0
        if every is None:
            # A step counts as one evaluation and its gradients, three times an evaluation: hardly a method does less.
            every = math.ceil(SAMPLES * (nfe + 2) / (SHARE * 3 * options.batch))
            budget = options.budget
            steps = {"steps": budget.amount, "images": budget.amount / options.batch}.get(budget.unit, math.inf)
            if steps < every:
                return 0
        if self.on_collapse == "rollback" and options.save_every:
            # A checkpoint that nobody has looked at is none to go back to.
            every = min(every, options.save_every)
        return math.ceil(every / options.log_every) * options.log_every

    def again(self, run: Run, back: Sequence[Rollback], step: int, why: str) -> bool:
        """Whether to roll back after a collapse at ``step``; False is to go on.

        Raises:
            CollapseError: the run is to stop, or it has been rolled back :data:`ROLLBACKS` times.
        """
        if self.on_collapse == "ignore":
            return False
        said = f"training stopped at step {step}: {why}"
        if self.on_collapse == "stop":
            good = good_checkpoint(run, step)
            left = f"checkpoint {good} was still good" if good else "no checkpoint was found good before"
            raise CollapseError(
                f"{said} ({left}): lower the learning rate, or let --on-collapse rollback halve it from there; "
                "--resume --on-collapse ignore goes on all the same"
            )
        if len(back) >= ROLLBACKS:
            raise CollapseError(
                f"{said}, after {len(back)} rollbacks with learning rates at {back[-1].rates:g} of those asked for: "
                "choose lower ones, a larger batch, or another method"
            )
        return True


@dataclass(frozen=True)
class Rollback:
    """A return to an earlier checkpoint.

    Attributes:
        collapsed: the step at which the samples had collapsed.
        to: the step of the checkpoint that training went on from; 0 is the start.
        why: what was wrong.
        rates: what learning rates are multiplied by from here on.
    """

    collapsed: int
    to: int
    why: str
    rates: float


def rollbacks(run: Run) -> list[Rollback]:
    """Those of a run so far, oldest first."""
    path = run.folder / FILE
    return [Rollback(**entry) for entry in read_json(path).get("rollbacks", [])] if path.is_file() else []


def write_facts(run: Run, facts: Mapping[str, Any], back: Sequence[Rollback]) -> None:
    """Writes the run's ``health.json``: what its log does not say.

    Raises:
        InputError: the place cannot be written.
    """
    body = {**facts, "rollbacks": [asdict(entry) for entry in back]}
    write_text(run.folder / FILE, json.dumps(body, indent=2) + "\n")


def good_checkpoint(run: Run, before: int) -> int:
    """The newest checkpoint that a look found good, at its step or later but earlier than ``before``; 0 without one."""
    looks = [e for e in run.read_log() if measures_in(e) is not None and e["step"] < before]
    last = max((int(e["step"]) for e in looks if "collapsed" not in e), default=0)
    return max((int(path.name) for path in run.checkpoints() if int(path.name) <= last), default=0)


def roll_back(run: Run, collapsed_at: int, why: str) -> Rollback:
    """Takes a run back to its newest :func:`good_checkpoint`, or to its start, and writes that down."""
    to = good_checkpoint(run, collapsed_at)
    before = rollbacks(run)
    entry = Rollback(collapsed_at, to, why, SLOWER ** (len(before) + 1))
    facts = read_json(run.folder / FILE)
    # Written first: a kill in between repeats the collapse from a later checkpoint, and never forgets the count.
    write_facts(run, {k: v for k, v in facts.items() if k != "rollbacks"}, [*before, entry])
    for path in reversed(run.checkpoints()):
        if int(path.name) > to:
            grave = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
            path.rename(grave)
            shutil.rmtree(grave)
    run.rewind_log(to)
    return entry
