"""Measuring one sampler of one generator: the row of a page."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.core.denoiser import CountingDenoiser
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.sample import Sampler
from fewstep.core.tableau import Tableau
from fewstep.data import Data
from fewstep.errors import InputError
from fewstep.grid.karras import karras
from fewstep.measure import METRICS, Statistics, evaluate
from fewstep.measure.evaluate import applicable, extractor_for
from fewstep.measure.reference import RealData
from fewstep.report.results import Group, Row
from fewstep.solve.dpmpp import dpmpp

SHOWN = 40


def converged(generator: Generator, n: int, *, seed: int, batch: int = 1000, steps: int = 96) -> Tensor:
    """(n, ...) end points of the generator's own ODE at the noise of ``seed``: third order, ``steps`` evaluations."""
    exact = converging(generator, steps)
    return generator.sample(n, seed=seed, sampler=exact, batch=batch, progress=False)


def converging(generator: Generator, steps: int = 96) -> Tableau:
    """The solver of :func:`converged`."""
    D = generator.denoiser
    return dpmpp(karras(steps, D.sigma_min, D.sigma_max), 3, exact=True)


@torch.no_grad()
def evaluations(generator: Generator, sampler: Sampler, seed: int = 0) -> int:
    """Denoiser evaluations of one picture, counted and not believed."""
    counted, probe = CountingDenoiser(generator.denoiser), Noise.of(seed, 1, generator.device)
    first = {k: v[:1] for k, v in generator.conditions(None, probe).items()}
    x = generator.start_std(sampler) * probe.normal(generator.denoiser.shape, "start")
    sampler(counted, x, first, noise=probe)
    return counted.nfe


def drawn_labels(generator: Generator, n: int, seed: int) -> Tensor | None:
    """The labels that ``generator.sample(n, seed=seed)`` draws on the CPU; None when it is unconditional."""
    return generator.conditions(None, Noise.of(seed, n)).get("label")


def check_metrics(
    metrics: Sequence[str] | str,
    real: RealData | Statistics,
    n: int,
    *,
    extractor: str | None = None,
    labelled: bool = True,
    prompts: bool = False,
) -> list[str]:
    """Refuses what :func:`fewstep.measure.evaluate` would refuse only once the pictures are there; returns the names.

    ``labelled`` is whether there will be a class for each picture, ``prompts`` whether a text.

    Raises:
        InputError: no extractor for these data, a reference of another extractor, a metric that does not apply, or
            fewer samples than a metric needs.
    """
    use = extractor_for(extractor, real)
    statistics = isinstance(real, Statistics)
    if isinstance(real, Statistics):
        real.check(use)
    shape = None if isinstance(real, Statistics) else real.shape
    names = applicable(metrics, use, shape, statistics=statistics)
    if not labelled and "accuracy" in names:
        if not isinstance(metrics, str):
            raise InputError("metric 'accuracy' needs a generator with classes: leave the metric out")
        names.remove("accuracy")
    if "clip_score" in names and not prompts:
        raise InputError("metric 'clip_score' needs the text of each picture: pass them to fewstep.measure.evaluate")
    for name in names:
        needed = 6 if name in ("precision", "recall", "density", "coverage") else METRICS[name].least
        if n < needed:
            raise InputError(f"metric {name!r} needs at least {needed} samples, got {n}: raise --n")
    return names


def measure_sampler(
    generator: Generator,
    sampler: Sampler,
    data: Data,
    *,
    name: str,
    group: Group,
    command: str,
    n: int = 2000,
    seed: int = 1,
    batch: int = 1000,
    metrics: Sequence[str] | str = "default",
    extractor: str | None = None,
    ends: Tensor | None = None,
    cond: Cond | None = None,
    progress: bool = False,
) -> Row:
    """Samples ``n`` pictures at ``seed``, scores them against ``data``, and pairs them with ``ends`` if given.

    Raises:
        InputError: see :func:`fewstep.measure.evaluate` and :meth:`Generator.sample`.
    """
    labels = drawn_labels(generator, n, seed) if cond is None else cond.get("label")
    # One small call first: what the machine does only once must not count as the sampler's time.
    generator.sample(8, seed=seed, sampler=sampler, progress=False)
    clock = time.perf_counter()
    pictures = generator.sample(n, cond, seed=seed, sampler=sampler, batch=batch, progress=progress)
    seconds = time.perf_counter() - clock
    scores = evaluate(pictures, data, metrics=metrics, labels=labels, extractor=extractor, seed=seed)
    rmse = None if ends is None else float((pictures - ends).flatten(1).double().square().mean(1).sqrt().mean())
    table = sampler if isinstance(sampler, Tableau) else None
    return Row(
        name,
        group,
        evaluations(generator, sampler, seed),
        scores,
        rmse,
        seconds,
        n,
        command,
        pictures[:SHOWN].clone(),
        table,
    )
