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
from fewstep.measure import evaluate
from fewstep.measure.evaluate import applicable, extractor_for
from fewstep.report.results import Group, Row
from fewstep.solve.dpmpp import dpmpp

SHOWN = 40


def converged(generator: Generator, n: int, *, seed: int, batch: int = 1000, steps: int = 96) -> Tensor:
    """(n, ...) end points of the generator's own ODE at the noise of ``seed``: third order, ``steps`` evaluations."""
    D = generator.denoiser
    exact = dpmpp(karras(steps, D.sigma_min, D.sigma_max), 3, exact=True)
    return generator.sample(n, seed=seed, sampler=exact, batch=batch, progress=False)


def drawn_labels(generator: Generator, n: int, seed: int) -> Tensor | None:
    """The labels that ``generator.sample(n, seed=seed)`` draws on the CPU; None when it is unconditional."""
    return generator.conditions(None, Noise.of(seed, n)).get("label")


def check_metrics(
    generator: Generator, data: Data, metrics: Sequence[str] | str, n: int, extractor: str | None = None
) -> None:
    """Refuses what :func:`measure_sampler` would refuse only after it has sampled.

    Raises:
        InputError: no extractor for these data, a metric that does not apply, or fewer samples than a metric needs.
    """
    names = applicable(metrics, extractor_for(extractor, data), data.shape)
    if generator.conds is None and "accuracy" in names and not isinstance(metrics, str):
        raise InputError("metric 'accuracy' needs a generator with classes: leave the metric out")
    needed = {"precision": 6, "recall": 6, "density": 6, "coverage": 6, "fd": 2, "pixel_fd": 2, "kid": 2}
    for name in names:
        if n < needed.get(name, 1):
            raise InputError(f"metric {name!r} needs at least {needed[name]} samples, got {n}: raise --n")


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
    counted = CountingDenoiser(generator.denoiser)
    clock = time.perf_counter()
    pictures = generator.sample(n, cond, seed=seed, sampler=sampler, batch=batch, progress=progress)
    seconds = time.perf_counter() - clock
    with torch.no_grad():
        probe = Noise.of(seed, 1, generator.device)
        first = {k: v[:1] for k, v in generator.conditions(None, probe).items()}
        x = generator.start_std(sampler) * probe.normal(generator.denoiser.shape, "start")
        sampler(counted, x, first, noise=probe)
    scores = evaluate(pictures, data, metrics=metrics, labels=labels, extractor=extractor, seed=seed)
    rmse = None if ends is None else float((pictures - ends).flatten(1).double().square().mean(1).sqrt().mean())
    table = sampler if isinstance(sampler, Tableau) else None
    return Row(name, group, counted.nfe, scores, rmse, seconds, n, command, pictures[:SHOWN].clone(), table)
