"""The front door of training: runs any method in a folder, with a live bar, sample grids, a log, and resume."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.core import distributed
from fewstep.core.cond import Classes
from fewstep.core.denoiser import Denoiser, Precond, Wrapper, edm, module_of, rewrapped
from fewstep.core.fit import Data, build_models, fit
from fewstep.core.generator import Generator, check_device
from fewstep.core.options import Budget, FitOptions, Report
from fewstep.core.path import FLOW, PURE_NOISE
from fewstep.core.role import Method, Models, Role
from fewstep.core.state import Run
from fewstep.data import Data as PictureData
from fewstep.errors import InputError, unknown
from fewstep.grid.karras import karras
from fewstep.models import ResMLP, ResMLPConfig, UNet, UNetConfig
from fewstep.models.checkpointing import checkpointed
from fewstep.models.lora import Adapted, LoRA, merge
from fewstep.models.offload import offloaded
from fewstep.report.pictures import save_grid
from fewstep.solve.heun import heun
from fewstep.train.flow_matching import LEAST, flow_sampler
from fewstep.train.health import Watch
from fewstep.train.monitor import REFERENCE, Monitor
from fewstep.train.roles import roles_of
from fewstep.train.rollback import OnCollapse, Watching, roll_back, rollbacks, write_facts


def untrained(
    data: PictureData, network: str = "unet", *, seed: int = 0, path: Literal["edm", "flow"] = "edm", **size: Any
) -> Generator:
    """A generator with fresh weights for the shape, classes and spread of ``data``.

    ``network`` is "unet" or "resmlp"; ``size`` changes fields of its config. ``path`` is "edm" for EDM's
    preconditioning, or "flow" for a network that predicts the velocity of straight paths from pure noise.

    Raises:
        InputError: an unknown network, path or field, or pictures it cannot be built for.
    """
    if network not in ("unet", "resmlp"):
        raise unknown("network", network, ("unet", "resmlp"))
    if path not in ("edm", "flow"):
        raise unknown("path to train on", path, ("edm", "flow"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if network == "unet":
                net: torch.nn.Module = UNet(UNetConfig.for_shape(data.shape, data.classes, **size))
            else:
                net = ResMLP(ResMLPConfig(data.shape, data.classes, **size))
        except TypeError as error:
            raise InputError(f"network {network!r} cannot take {sorted(size)}: {error}") from None
    conds, spread = Classes(tuple(data.frequencies)) if data.classes else None, round(data.std, 4)
    if path == "flow":
        flow = Precond(
            net, data.shape, path=FLOW, predicts="velocity", sigma_min=LEAST, sigma_max=PURE_NOISE, sigma_data=spread
        )
        return Generator(flow, flow_sampler(flow, 18, "heun"), None, conds)
    denoiser = edm(net, data.shape, sigma_data=spread)
    return Generator(denoiser, heun(karras(18, denoiser.sigma_min, denoiser.sigma_max)), None, conds)


def train(
    start: Generator,
    method: Method,
    data: Data,
    *,
    out: str | Path,
    budget: str | int | Budget,
    resume: bool = False,
    overwrite: bool = False,
    keep: int = 2,
    grid_every: int = 0,
    progress: bool = True,
    recipe: Mapping[str, Any] | None = None,
    lora: LoRA | None = None,
    lora_roles: Sequence[str] | None = None,
    on_collapse: OnCollapse = "stop",
    check_every: int | None = None,
    page: bool = False,
    **options: Any,
) -> Generator:
    """Runs ``method`` from ``start`` and leaves a run folder that is also a generator folder.

    ``budget`` is like "2000 steps", "200k images" or "90s". ``options`` are the fields of
    :class:`fewstep.core.options.FitOptions`. ``grid_every`` steps a picture of samples is written (0: only at the end).
    ``on_collapse`` and ``check_every`` are the fields of :class:`fewstep.train.rollback.Watching`. ``page`` writes
    ``run.html``, which follows the run while it is open. Under torchrun every process calls this; rank 0 writes.

    With ``lora`` the roles that copy the teacher, or those named in ``lora_roles``, train LoRA layers on its weights,
    which then stand in memory once. The generator is the merged student; its LoRA lies beside it, in ``lora/``.

    Raises:
        InputError: bad options, a network that LoRA cannot adapt, or an ``out`` that holds another run.
        NonFiniteError: training diverged.
        CollapseError: samples became alike, lost modes or blew up, and that ends the run.
    """
    watching = Watching(on_collapse, check_every)
    device = check_device(options.get("device", "cpu"))
    distributed.start(device)
    if "save_every" not in options and grid_every:
        options["save_every"] = grid_every
    chosen = options_of(budget, options)
    roles = roles_of(method, start, lora, lora_roles)
    place = offload_of(chosen, lora)
    made = {"method": type(method).__name__, "settings": asdict(method), "options": _lasting(chosen)}  # type: ignore[call-overload]
    if lora is not None:
        made["lora"] = {**asdict(lora), "roles": None if lora_roles is None else list(lora_roles)}
    # What it is trained from and on: resuming with another teacher would silently go on.
    sources = {
        "from": start.fingerprint() if isinstance(start.denoiser, Precond | Wrapper) else None,
        "data": getattr(data, "fingerprint", None),
    }
    body = {**(recipe or {}), **made, **sources}
    first = distributed.rank() == 0
    run = Run.open(Path(out), body, resume=resume, overwrite=overwrite, keep=keep) if first else Run(Path(out), keep)
    distributed.barrier()
    live = None
    if page and first:
        # Not at the top, because templates take time to import and few runs have a page.
        from fewstep.report.run_page import Live

        live = Live(run.folder)
    with Monitor(run, chosen, on=first, live=live) as monitor:
        job = _Job(
            method, start, data, chosen, run, roles, place, watching, monitor, lora is not None, grid_every, progress
        )
        while True:
            shipped, last, why = job.go(resume)
            if why is None:
                break
            if first:
                roll_back(run, int(last["step"]), why)
            distributed.barrier()
            resume = True
        card = {**made, **sources, "trained": last}
        if first and (back := rollbacks(run)):
            card["rollbacks"] = [asdict(entry) for entry in back]
        shipped = _finish(shipped, card, Path(out) if first else None)
    distributed.barrier()
    return shipped


@dataclass(frozen=True)
class _Job:
    """What a run is made of."""

    method: Method
    start: Generator
    data: Data
    options: FitOptions
    run: Run
    roles: Mapping[str, Role]
    place: Callable[[torch.nn.Module], torch.nn.Module] | None
    watching: Watching
    monitor: Monitor
    adapts: bool
    grid_every: int
    progress: bool

    def go(self, resume: bool) -> tuple[Generator, dict[str, Any], str | None]:
        """Trains to the end; returns the generator, the last log entry, and why to roll back, or None.

        Raises:
            CollapseError: a collapse that ends the run.
        """
        run, chosen, first = self.run, self.options, distributed.rank() == 0
        step = _saved(run) if resume else 0
        if first:
            run.rewind_log(step)
        back = rollbacks(run)
        models = self.models(back[-1].rates if back else 1.0)
        shipped = _shipped(self.method, models, self.start)
        # A finished run that is resumed has nothing to report, but it was trained.
        log = run.read_log() if first else []
        last: dict[str, Any] = log[-1] if log else {}
        over = chosen.budget.progress(step, step * chosen.batch, 0.0) >= 1
        if not over:
            self.monitor.begin(step, models.roles)
        every = 0 if over else self.watching.steps(chosen, models, shipped.sampler.nfe)
        watch = None
        if every and first:
            watch = Watch(self.method, models, shipped, self.start, self.data, chosen, log)
            write_facts(run, watch.facts(), back)
            self.monitor.keep(REFERENCE, watch.compared, shipped, 0.0)
            self.monitor.keep(f"{0:08d}", watch.seen, shipped, shipped.sampler.end)
        saves_memory = checkpointed(models.networks.values()) if chosen.checkpointing else contextlib.nullcontext()
        with _Bar(type(self.method).__name__, chosen, self.progress and first) as bar, saves_memory:
            for report in fit(self.method, models, self.data, chosen, run, start=step):
                look = every > 0 and (report.done or report.step % every == 0)
                if first:
                    last = _entry(report) | (watch.look(report) if watch is not None and look else {})
                    last |= {"rollbacks": len(back)} if back else {}
                    run.log(last)
                    if watch is not None and look:
                        self.monitor.look(watch.seen, shipped, report, ill="collapsed" in last)
                    self.monitor.report(report)
                    bar.show(report)
                if look:
                    # Rank 0 has looked; what follows from it must be the same everywhere.
                    why = str(distributed.agree(last.get("collapsed", "")))
                    if why and self.watching.again(run, back, report.step, why):
                        return shipped, last, why
                # After the verdict, because samples that are not finite make no picture.
                grid = self.grid_every and report.step % self.grid_every < chosen.log_every
                if first and (report.done or grid):
                    save_grid(shipped.sample(64, progress=False), run.folder / "samples" / f"{report.step:08d}.png")
        return shipped, last, None

    def models(self, rates: float) -> Models:
        """The networks before training, whose learning rates are ``rates`` times the method's.

        Raises:
            InputError: LoRA was asked for and no network takes it.
        """
        roles = {
            name: role if role.optim is None else replace(role, optim=replace(role.optim, lr=rates * role.optim.lr))
            for name, role in self.roles.items()
        }
        models = build_models(roles, str(self.options.device), self.options.seed, offload=self.place)
        if self.adapts and not any(isinstance(network, Adapted) for network in models.networks.values()):
            raise InputError(f"{type(self.method).__name__} trains no copy of the teacher: leave LoRA out")
        return models


def _saved(run: Run) -> int:
    """The step of the newest checkpoint, 0 before the first.

    Raises:
        InputError: it is damaged.
    """
    found = run.latest()
    return 0 if found is None else int(found[0]["step"])


def options_of(budget: str | int | Budget, options: Mapping[str, Any]) -> FitOptions:
    """The checked options of a run.

    Raises:
        InputError: an unknown option, or a bad value.
    """
    try:
        return FitOptions(budget=Budget.parse(budget), **options)
    except TypeError as error:
        raise InputError(f"unknown training option: {error}") from None


def _lasting(options: FitOptions) -> dict[str, Any]:
    """What a run is resumed with: all but what saves memory, which may change when the memory runs out."""
    return {k: v for k, v in asdict(options).items() if k not in ("checkpointing", "offload")}


def offload_of(options: FitOptions, lora: LoRA | None) -> Callable[[torch.nn.Module], torch.nn.Module] | None:
    """What keeps a frozen network in host memory during a run; None where that was not asked for.

    Raises:
        InputError: offloading on the CPU, or of a teacher whose weights a LoRA student shares.
    """
    if not options.offload:
        return None
    if torch.device(options.device).type == "cpu":
        raise InputError("offload moves frozen weights to host memory, where device 'cpu' has them: leave it out")
    if lora is not None:
        raise InputError("offload has nothing to move: with LoRA the teacher's weights are the student's: leave it out")
    return partial(offloaded, device=options.device)


def _finish(shipped: Generator, card: dict[str, Any], out: Path | None) -> Generator:
    """What the run is for, as files: the generator, merged where it was trained with LoRA, and that LoRA beside it."""
    from fewstep.export.lora import save_lora

    view = module_of(shipped.denoiser)
    if isinstance(view, Adapted):
        shipped = replace(shipped, denoiser=rewrapped(shipped.denoiser, merge(view)))
        card["lora"] = {**card["lora"], "file": "lora", "layers": len(view.targets)}
    shipped.card = card
    if out is not None:
        if isinstance(view, Adapted):
            save_lora(view, out / "lora")
        shipped.save(out)
    return shipped


def _shipped(method: Method, models: Models, start: Generator) -> Generator:
    name = next(n for n, role in models.roles.items() if role.ships)
    ships: Callable[[Any], Denoiser] = getattr(method, "ships", lambda network: network)
    made = ships(models.ema(name))
    return Generator(made, method.sampler(start), start.codec, start.conds, pipeline=start.pipeline)


def _entry(report: Report) -> dict[str, Any]:
    return {
        "step": report.step,
        "images": report.images,
        "seconds": round(report.seconds, 3),
        "skipped": report.skipped,
        # JSON has no nan: a mean that holds a skipped update is null.
        **{k: float(f"{v:.6g}") if math.isfinite(v) else None for k, v in report.losses.items()},
    }


class _Bar:
    """A live line: share done, loss, images per second, time left."""

    def __init__(self, title: str, options: FitOptions, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            "{task.percentage:.0f}%",
            TextColumn("{task.fields[say]}"),
        )
        self.bar = Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=not shown
        )
        self.task = self.bar.add_task(title, total=1.0, say="")
        self.before: tuple[int, float] | None = None

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def show(self, report: Report) -> None:
        """Draws a report."""
        images, seconds = self.before or (0, 0.0)
        rate = (report.images - images) / max(report.seconds - seconds, 1e-9)
        self.before = (report.images, report.seconds)
        losses = "  ".join(f"{k.replace('/loss', '')} {v:.4g}" for k, v in report.losses.items() if k.endswith("/loss"))
        skipped = f"  skipped {report.skipped}" if report.skipped else ""
        self.bar.update(self.task, completed=report.progress, say=f"{losses}  {rate:,.0f} img/s{skipped}")
