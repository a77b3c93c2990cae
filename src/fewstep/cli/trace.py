"""``fewstep trace``: a scheduler of diffusers as a tableau."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from fewstep.cli.base import pairs
from fewstep.core.state import write_text
from fewstep.errors import InputError
from fewstep.tracing import scheduler_config, trace


@dataclass(frozen=True)
class Trace:
    """Writes the table of a scheduler of diffusers, checked against the scheduler itself.

    Attributes:
        scheduler: a scheduler_config.json, a folder that holds one (also as scheduler/), or the name of a class of
            diffusers, with its defaults.
        out: the tableau's file, a .json.
        steps: what the scheduler calls its number of inference steps.
        set: KEY=VALUE changes an entry of the configuration; may be repeated.
        option: KEY=VALUE is passed to the scheduler's set_timesteps or step, such as eta=1.0; may be repeated.
        tolerance: how far the replayed table may be from the scheduler, relative to the larger of 1 and the point.
        overwrite: replaces the file.
    """

    scheduler: Annotated[str, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    steps: int = 20
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    tolerance: float = 1e-4
    overwrite: bool = False

    def run(self) -> None:
        """Runs the command."""
        if self.out.exists() and not self.overwrite:
            raise InputError(f"{self.out} exists: choose another --out, or pass --overwrite")
        options = pairs("--option", self.option)
        clash = sorted({"steps", "sigmas", "check", "tolerance"} & options.keys())
        if clash:
            raise InputError(f"--option does not take {clash[0]}: it is for the scheduler's set_timesteps and step")
        config = scheduler_config(self.scheduler, pairs("--set", self.set))
        table = trace(config, steps=self.steps, tolerance=self.tolerance, **options)
        write_text(self.out, table.to_json())
        facts = table.meta["traced"]
        told = (
            f"{self.out}: {table.name}, {table.nfe} evaluations from sigma {table.start:.5g} to {table.levels[-1]:.4g}"
        )
        told += f", {'noisy' if table.noisy else 'no noise'}, replayed to {facts['replay_error']:.1e}"
        Console(stderr=True).print(told, highlight=False, soft_wrap=True)
