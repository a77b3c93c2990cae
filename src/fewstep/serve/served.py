"""What stands behind the page: from a request to pictures and facts, each a function of the request alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.core.cond import Classes
from fewstep.core.denoiser import module_of
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise, shown, whole
from fewstep.core.path import FlowPath
from fewstep.core.pipeline import TextConditions
from fewstep.core.sample import Sampler, Step
from fewstep.core.solver import SOLVERS, build
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid import grid, own_grid
from fewstep.guide import guided
from fewstep.serve.request import (
    OWN,
    TOP_SEED,
    UPLOADED,
    Limits,
    Panel,
    Path,
    Request,
    Stage,
    between,
    read_table,
    spread,
)

Fits = Callable[[Sampler, Generator, str], None]


@dataclass(frozen=True)
class _Chosen:
    """A generator under guidance with a sampler, ready to run."""

    made: Generator
    sampler: Sampler
    label: str
    notes: tuple[str, ...]


class Served:
    """Generators behind one lock, so that times are those of one request and no network runs twice at once.

    ``fits(sampler, generator, place)`` raises InputError for a tableau that was made for something else; None lets
    every tableau run on every generator.

    Raises:
        InputError: no generator.
    """

    def __init__(self, generators: Mapping[str, Generator], *, fits: Fits | None, limits: Limits | None = None) -> None:
        if not generators:
            raise InputError("there is nothing to serve: expected at least one generator")
        self.generators = dict(generators)
        self.limits = limits or Limits()
        self._fits = fits
        self._lock = threading.Lock()
        self._warm: set[str] = set()
        self._known: dict[tuple[Any, ...], str] = {}

    @property
    def reads_prompts(self) -> bool:
        """Whether any generator does."""
        return any(isinstance(g.conds, TextConditions) for g in self.generators.values())

    @property
    def guidable(self) -> bool:
        """Whether any generator has conditions."""
        return any(g.conds is not None for g in self.generators.values())

    @property
    def classes(self) -> tuple[str, ...]:
        """What the classes are called, of the generator with the most; numbers where they have no names."""
        all_of = [g.conds for g in self.generators.values() if isinstance(g.conds, Classes)]
        most = max(all_of, key=lambda c: len(c.frequencies), default=None)
        if most is None:
            return ()
        return most.names or tuple(str(i) for i in range(len(most.frequencies)))

    def check(self, request: Request) -> Tableau | None:
        """The uploaded tableau, if the samplers ask for it.

        Raises:
            InputError: something in the request is missing, unknown, of another kind, or beyond the limits.
        """
        top = self.limits
        for name in request.generators:
            if name not in self.generators:
                raise unknown("generator", shown(name), self.generators)
        for name in request.samplers:
            if name not in (OWN, UPLOADED, *SOLVERS):
                raise unknown("sampler", shown(name), [OWN, UPLOADED, *SOLVERS])
        for what, chosen in (("generator", request.generators), ("sampler", request.samplers)):
            if not chosen:
                raise InputError(f"no {what} is chosen: choose at least one")
            if len(set(chosen)) < len(chosen):
                raise InputError(f"a {what} is chosen twice: choose each once")
        panels = len(request.generators) * len(request.samplers)
        if panels > top.panels:
            told = f"{len(request.generators)} generators by {len(request.samplers)} samplers are {panels} panels"
            raise InputError(f"{told}, and at most {top.panels} fit: choose fewer")
        between("the number of pictures", request.count, 1, top.pictures)
        between("the seed", request.seed, 0, TOP_SEED)
        between("the number of steps", request.steps, 1, top.steps)
        if request.label is not None:
            whole("the label", request.label)
        for what, text in (("prompt", request.prompt), ("negative prompt", request.negative)):
            if not isinstance(text, str) or len(text) > top.prompt:
                size = f"{len(text)} letters" if isinstance(text, str) else shown(text)
                raise InputError(f"the {what} must be a text of at most {top.prompt} letters, got {size}")
        if UPLOADED not in request.samplers:
            return None
        if request.table is None:
            raise InputError(f"{UPLOADED!r} is chosen and no file is there: upload the tableau.json of a calibration")
        return read_table(request.table, self.limits)

    def make(self, request: Request) -> list[Panel]:
        """A panel for each generator by each sampler; what one of them cannot do is told in its panel.

        Raises:
            InputError: see :meth:`check`.
        """
        table, panels = self.check(request), list[Panel]()
        for name in request.generators:
            for sampler in request.samplers:
                panels.append(self._panel(name, sampler, request, table))
        first = panels[0].pictures
        return [panels[0], *(replace(p, distance=_distance(p.pictures, first)) for p in panels[1:])]

    def follow(self, request: Request, number: int = 0) -> list[Path]:
        """How picture ``number`` (from 0) of each panel of :meth:`make` came about.

        Raises:
            InputError: see :meth:`check`, and a number that the request does not have.
        """
        table, paths = self.check(request), list[Path]()
        between("the number of the picture", number, 0, request.count - 1)
        for name in request.generators:
            for sampler in request.samplers:
                try:
                    chosen = self._choose(name, sampler, request, table)
                    with self._lock:
                        paths.append(self._path(name, chosen, request, number))
                except _REFUSED as error:
                    paths.append(Path(name, sampler, error=_told(error)))
        return paths

    def _panel(self, name: str, sampler: str, request: Request, table: Tableau | None) -> Panel:
        try:
            chosen = self._choose(name, sampler, request, table)
            made, cond = chosen.made, _conditions(chosen.made, request, request.count)
            with self._lock:
                self._warm_up(name, made, request)
                clock = time.perf_counter()
                pictures = made.sample(
                    request.count, cond, seed=request.seed, sampler=chosen.sampler, batch=request.count, progress=False
                )
                seconds = time.perf_counter() - clock
        except _REFUSED as error:
            return Panel(name, sampler, error=_told(error))
        return Panel(name, chosen.label, pictures, chosen.sampler.nfe, seconds, notes=chosen.notes)

    def _choose(self, name: str, sampler: str, request: Request, table: Tableau | None) -> _Chosen:
        """The generator under the guidance asked for, with the sampler."""
        made, notes = self.generators[name], []
        if request.guidance != 1:
            if made.conds is None:
                notes.append("without guidance: it has no conditions")
            else:
                negative = request.negative if isinstance(made.conds, TextConditions) else ""
                made = guided(made, request.guidance, negative)
                notes.append("under guidance an evaluation is two passes of the network")
        if sampler == OWN:
            return _Chosen(made, made.sampler, f"{getattr(made.sampler, 'name', 'sampler')} (its own)", tuple(notes))
        if sampler == UPLOADED:
            assert table is not None
            self._check_fits(name, made, request, table)
            return _Chosen(made, table, f"{table.name[:60]} (uploaded)", tuple(notes))
        D = made.denoiser
        # Karras' levels would all lie above the picture where a path begins with pure noise.
        flow = isinstance(getattr(module_of(D), "path", None), FlowPath)
        levels = own_grid(D, request.steps) if flow else grid("karras", request.steps, D.sigma_min, D.sigma_max)
        spaced = "levels even in its own time" if flow else "Karras' levels"
        return _Chosen(made, build(sampler, levels), sampler, (*notes, f"{request.steps} steps on {spaced}"))

    def _check_fits(self, name: str, made: Generator, request: Request, table: Tableau) -> None:
        """Raises InputError for a tableau of something else; remembered, because a fingerprint reads all weights."""
        if self._fits is None:
            return
        key = (name, request.guidance, request.negative, request.table)
        if key not in self._known:
            try:
                self._fits(table, made, "the uploaded tableau")
                said = ""
            except InputError as error:
                said = str(error)
            except (AttributeError, TypeError, ValueError):
                said = "the uploaded tableau's meta is garbled: upload what fewstep calibrate wrote"
            if len(self._known) >= 64:
                self._known.clear()
            self._known[key] = said
        if self._known[key]:
            raise InputError(self._known[key])

    def _warm_up(self, name: str, made: Generator, request: Request) -> None:
        """One evaluation before the first that is timed, which would pay for loading what is loaded when needed."""
        if name in self._warm:
            return
        D, noise = made.denoiser, Noise.of(0, 1, made.device)
        cond = made.conditions(_conditions(made, request, 1), noise)
        with torch.no_grad():
            x = made.start_std() * noise.normal(D.shape, "start")
            made.decode(D(x, min(made.sampler.start, D.sigma_max), cond))
        self._warm.add(name)

    @torch.no_grad()
    def _path(self, name: str, chosen: _Chosen, request: Request, number: int) -> Path:
        made, sampler = chosen.made, chosen.sampler
        noise = Noise.of(request.seed, torch.tensor([number]), made.device)
        cond = made.conditions(_conditions(made, request, 1), noise)
        seen: list[tuple[float, Tensor, Tensor | None]] = []

        def keep(step: Step) -> None:
            # Samplers may write over their points.
            seen.append((step.level, step.point.clone(), None if step.denoised is None else step.denoised.clone()))

        x = made.start_std(sampler) * noise.normal(made.denoiser.shape, "start")
        end = sampler(made.denoiser, x, cond, noise=noise.fold("sampler"), on_step=keep)
        # The result is shown as it is decoded, which the last point that was reported need not be.
        passed = [s for s in seen if s[2] is not None]
        stages = []
        for level, point, output in (passed[i] for i in spread(len(passed), self.limits.columns - 1)):
            state = made.decode(point / (1 + level**2) ** 0.5)
            stages.append(Stage(level, _shown(state), None if output is None else _shown(made.decode(output))))
        stages.append(Stage(sampler.end, _shown(made.decode(end, sampler.end)), None))
        return Path(name, chosen.label, tuple(stages), len(passed) + 1)


_REFUSED = (InputError, torch.OutOfMemoryError)


def _told(error: BaseException) -> str:
    """A refusal on one line."""
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    return "out of memory: ask for fewer pictures, or for fewer panels"


def _conditions(made: Generator, request: Request, count: int) -> Any:
    """What of the request this generator takes; None lets it draw by the seed."""
    if isinstance(made.conds, TextConditions):
        return request.prompt
    if isinstance(made.conds, Classes) and request.label is not None:
        return {"label": torch.full((count,), request.label)}
    return None


def _distance(pictures: Tensor | None, first: Tensor | None) -> float | None:
    if pictures is None or first is None or pictures.shape != first.shape:
        return None
    return float((pictures - first).double().square().mean().sqrt())


def _shown(decoded: Tensor) -> Tensor:
    """One decoded picture, on the CPU within [-1, 1]; what is not finite is grey."""
    return decoded[0].float().cpu().nan_to_num(0.0, 1.0, -1.0).clamp(-1, 1)
