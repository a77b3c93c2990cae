"""``fewstep export-sampler``: the levels of a sampler as a list, for tools that take nothing else."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from fewstep.core.generator import CONFIG, Generator
from fewstep.core.path import FLOW
from fewstep.core.path import Path as NoisePath
from fewstep.core.state import read_json, write_text
from fewstep.core.stored import load_sampler
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.export.sigmas import NOISY, PLAIN, as_text, plain_sampler, rounded_times, sigma_list


@dataclass(frozen=True)
class ExportSampler:
    """Prints the levels of a table as a list of sigmas that ends at 0, and says what such a list loses.

    Attributes:
        sampler: a tableau's .json, or the folder of a generator whose sampler is a table.
        format: json (an object), text (a number a line), comfyui (one line with commas), or diffusers (the arguments
            timesteps= and sigmas= of a pipeline).
        steps: another number of steps, interpolated as for Align Your Steps; the table's own without one.
        flow: prints flow times sigma / (1 + sigma) in place of sigmas.
        flow_shift: with --flow, the shift that the tool applies to the times by itself; it is taken out.
        like: the scheduler_config.json of the pipeline, for the timesteps of --format diffusers.
        out: a file in place of the terminal.
        overwrite: replaces the file.
    """

    sampler: Annotated[Path, tyro.conf.Positional]
    format: Literal["json", "text", "comfyui", "diffusers"] = "json"
    steps: int | None = None
    flow: bool = False
    flow_shift: float = 1.0
    like: Path | None = None
    out: Path | None = None
    overwrite: bool = False

    def run(self) -> None:
        """Runs the command."""
        if self.out is not None and self.out.exists() and not self.overwrite:
            raise InputError(f"{self.out} exists: choose another --out, or pass --overwrite")
        if self.flow_shift != 1 and not self.flow:
            raise InputError(f"--flow-shift {self.flow_shift:g} is for flow models: pass --flow too")
        if not self.flow_shift > 0:
            raise InputError(f"--flow-shift must be positive, got {self.flow_shift:g}")
        table = self._table()
        path: NoisePath | None = FLOW(shift=self.flow_shift) if self.flow else None
        times = self._times(table)
        text = as_text(table, self.format, steps=self.steps, path=path, times=times)
        if self.out is None:
            sys.stdout.write(text)
        else:
            write_text(self.out, text)
        said = Console(stderr=True)
        for line in self._remarks(table, times):
            said.print(line, highlight=False, soft_wrap=True, markup=False)

    def _table(self) -> Tableau:
        if self.sampler.is_dir() and (self.sampler / CONFIG).is_file():
            found: Any = Generator.load(self.sampler).sampler
        else:
            found = load_sampler(self.sampler)
        if not isinstance(found, Tableau):
            raise InputError(
                f"{self.sampler} holds a {type(found).__name__}, whose levels or weights depend on the state: only a "
                "table has a list of levels"
            )
        return found

    def _times(self, table: Tableau) -> list[float] | None:
        """The model's own timesteps of the levels, where they are asked for."""
        if self.format != "diffusers" or self.flow:
            if self.like is not None:
                raise InputError("--like is for --format diffusers without --flow: only there are timesteps printed")
            return None
        from fewstep.export.scheduler import TableauScheduler, model_of
        from fewstep.solve import euler

        like = None if self.like is None else read_json(self.like)
        if like is None and "traced" not in table.meta:
            raise InputError(
                "--format diffusers prints timesteps, which depend on the model: pass --like with the pipeline's "
                "scheduler_config.json, or --flow for a flow model"
            )
        levels = euler(sigma_list(table, steps=self.steps))
        if like is None:
            facts = table.meta["traced"]
            like = {**facts["config"], "_class_name": facts["scheduler"]}
        if model_of(like)["path"] != "vp":
            raise InputError("this scheduler is a flow model's, whose pipelines take flow times: pass --flow")
        # Only the times are wanted; what the network predicts is of no matter here.
        made = TableauScheduler.from_tableau(levels, like, "v_prediction")
        return [float(t) for t in made.timesteps]

    def _remarks(self, table: Tableau, times: list[float] | None) -> list[str]:
        told = plain_sampler(table)
        names = (NOISY if table.noisy else PLAIN)[told.name]
        use = f"ComfyUI: {names[0]}; diffusers: {names[1] or 'no stock scheduler takes a list for it'}"
        lines = [
            f"{table.name}: a list keeps its levels and not its weights; the nearest sampler is {told.name} ({use})"
        ]
        if table.noisy:
            lines.append(
                "the table adds noise, and a list does not say how much: it needs a sampler that adds the same. The "
                f"weights of outputs and noise differ from those of {told.name} by up to {told.apart:.2g}"
            )
        else:
            lines.append(
                f"on an exact mixture their results differ by {told.apart:.2g}; error against the converged ODE: "
                f"{told.table_error:.2g} for the table, {told.best_error:.2g} for the list with the best plain "
                f"sampler, {told.best}"
            )
        if self.steps is not None and self.steps != len(sigma_list(table)) - 1:
            lines.append(f"interpolated to {self.steps} steps: these numbers are for the table's own grid")
        moved = [] if times is None else rounded_times(times)[1]
        if moved:
            lines.append(f"timesteps that would have been the same when rounded were moved down: {moved}")
        return lines
