"""What the tests of ``fewstep serve`` serve."""

from __future__ import annotations

from dataclasses import replace

from fewstep.cli.base import check_fits
from fewstep.core.generator import Generator
from fewstep.core.solver import build
from fewstep.grid import grid
from fewstep.serve import Limits, Served
from tiny_runs import tiny


def few(made: Generator, steps: int = 3) -> Generator:
    """The generator with a cheap sampler of its own."""
    D = made.denoiser
    return made.with_sampler(build("euler", grid("karras", steps, D.sigma_min, D.sigma_max)))


def two() -> Served:
    """A generator with classes and one without."""
    plain = replace(few(tiny(), 2), conds=None)
    return Served({"teacher": few(tiny()), "plain": plain}, fits=check_fits, limits=Limits(pictures=6, steps=20))
