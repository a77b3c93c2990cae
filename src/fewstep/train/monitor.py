"""What a run leaves for its page beside its log: learning rates, the machine, and pictures of its samples over time.

None of it is read by training or drawn from its noise, and none of it is in the log: two runs of the same recipe have
the same log, whatever machine they ran on.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fewstep.core.generator import Generator
from fewstep.core.options import FitOptions, Report
from fewstep.core.role import Role
from fewstep.core.state import Run, write_bytes, write_text
from fewstep.errors import InputError
from fewstep.report.pictures import grid_image
from fewstep.train.health import SHOWN

# One line for each report and for each start, stop and end; pictures of looks by their step, and of what they are
# compared with.
FILE, LOOKS, REFERENCE = "monitor.jsonl", "looks", "reference"
# A sheet has all samples that a look keeps, or this many where latents have to be decoded for it; large ones are shrunk
# to SIDE pixels.
DECODED, SIDE = 4, 64
# Sheets of a whole run, spread evenly over its budget.
SHEETS = 24


class Following(Protocol):
    """A page that is kept up to date, such as :class:`fewstep.report.run_page.Live`."""

    def update(self) -> object:
        """Called after every line."""

    def end(self) -> None:
        """Called once, when the run has ended."""


class Monitor:
    """Writes down how a run goes, on the process that writes.

    Args:
        run: the run's folder.
        options: of the run.
        on: False does nothing, as on all processes but the first.
        live: a page that follows the run.

    As a context it notes the end: that the run is finished, or the error that stopped it.
    """

    def __init__(self, run: Run, options: FitOptions, *, on: bool = True, live: Following | None = None) -> None:
        self.run, self.options, self.on, self.live = run, options, on, live
        self.roles: Mapping[str, Role] = {}
        self.sheet, self.begun = -1, False
        self.clock = (time.monotonic(), time.process_time())

    def begin(self, step: int, roles: Mapping[str, Role]) -> None:
        """Forgets what came after ``step``, where training starts, goes on, or went back to.

        Raises:
            InputError: the place cannot be written.
        """
        if not self.on:
            return
        self.roles, self.sheet, self.clock = roles, -1, (time.monotonic(), time.process_time())
        path = self.run.folder / FILE
        if path.exists():
            kept = [line for line in read_monitor(self.run.folder) if line.get("step", 0) <= step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        for sheet in sheets(self.run.folder):
            if int(sheet.stem) > step:
                sheet.unlink()
        self.begun = True
        self._write({"step": step, "event": "resumed" if step else "started"})
        self._page()

    def report(self, report: Report) -> None:
        """Notes the learning rates of the next step and what the machine is doing.

        Raises:
            InputError: the place cannot be written.
        """
        if not self.on:
            return
        now, before = (time.monotonic(), time.process_time()), self.clock
        self.clock = now
        rates = {n: r.optim.rate(report.step, report.progress) for n, r in self.roles.items() if r.optim is not None}
        entry = {
            "step": report.step,
            "progress": round(report.progress, 6),
            "rates": {name: float(f"{rate:.6g}") for name, rate in rates.items()},
            # Processor seconds of this process in each second: the number of cores that it keeps busy.
            "cores": round((now[1] - before[1]) / max(now[0] - before[0], 1e-9), 3),
            **machine(self.options.device),
        }
        self._write(entry)
        self._page()

    def look(self, x: Tensor, made: Generator, report: Report, *, ill: bool = False) -> None:
        """Keeps a sheet of the samples ``x`` (n, ...) of a look, if it is time for one, or if they are ``ill``."""
        due = int(report.progress * SHEETS)
        if self.on and (due > self.sheet or report.done or ill):
            self.sheet = due
            self.keep(f"{report.step:08d}", x, made, made.sampler.end)

    @torch.no_grad()
    def keep(self, name: str, x: Tensor, made: Generator, level: float) -> None:
        """Writes the first of ``x`` (n, ...), results of ``made`` at noise level ``level``, as ``looks/<name>.png``.

        Samples that are not finite make no picture.

        Raises:
            InputError: the place cannot be written.
        """
        if not self.on:
            return
        few = x[: SHOWN if made.codec is None else DECODED].to(made.device)
        # One at a time, because decoding many latents takes more memory than training leaves.
        pictures = torch.cat([made.decode(few[i : i + 1], level).float().cpu() for i in range(len(few))])
        if not pictures.isfinite().all():
            return
        side = max(pictures.shape[2:])
        if side > SIDE:
            pictures = interpolate(pictures, scale_factor=SIDE / side, mode="area")
        held = io.BytesIO()
        # Grey paper, because white frames glare on a dark page.
        grid_image(pictures, 4, paper=128).save(held, "PNG")
        write_bytes(self.run.folder / LOOKS / f"{name}.png", held.getvalue())

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self.on:
            return
        step = next((line["step"] for line in reversed(read_monitor(self.run.folder)) if "step" in line), 0)
        try:
            if error is None:
                # A finished run that is resumed has nothing to add.
                if self.begun:
                    self._write({"step": step, "event": "finished"})
            else:
                said = "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
                why = " ".join(str(error).split()) or said
                self._write({"step": step, "event": "stopped", "why": why[:1000]})
            if self.live is not None:
                self.live.end()
        except InputError:
            # What stopped the run is what has to be told.
            if error is None:
                raise

    def _page(self) -> None:
        if self.live is not None:
            self.live.update()

    def _write(self, entry: Mapping[str, Any]) -> None:
        path = self.run.folder / FILE
        try:
            with path.open("a") as file:
                file.write(json.dumps({"at": round(time.time(), 3), **entry}) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}: free some space") from None


def read_monitor(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``monitor.jsonl``, oldest first; a last one that a kill cut short is left out."""
    path, found = folder / FILE, []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def sheets(folder: Path) -> list[Path]:
    """The sheets of a run's looks, in the order of their steps."""
    return sorted(folder.glob(f"{LOOKS}/[0-9]*.png"))


def machine(device: str) -> dict[str, Any]:
    """What the machine is doing now, at the cost of reading a few counters.

    Returns:
        ``memory`` of this process in bytes; ``load``, the machine's average number of waiting processes in the last
        minute, where the system counts them; and on an accelerator ``device_memory`` in bytes, as torch reserved it,
        and on CUDA ``device_peak``, the most so far.
    """
    found: dict[str, Any] = {}
    memory = resident()
    if memory is not None:
        found["memory"] = memory
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)
    kind = torch.device(device).type
    if kind == "cuda":
        found["device_memory"] = torch.cuda.memory_reserved(device)
        found["device_peak"] = torch.cuda.max_memory_reserved(device)
    elif kind == "mps":
        found["device_memory"] = torch.mps.driver_allocated_memory()
    return found


def _from_proc() -> int:
    """Resident memory now, as Linux tells it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _from_usage() -> int:
    """The largest resident memory so far, as every Unix tells it: in KiB, and in bytes on macOS."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def resident() -> int | None:
    """Bytes of memory that this process holds, or the most that it held where only that is told; None on Windows."""
    ways: tuple[Callable[[], int], ...] = (_from_proc, _from_usage)
    for read in ways:
        try:
            return read()
        except (OSError, ImportError):
            continue
    return None
