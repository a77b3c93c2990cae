"""Classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fewstep.core.cond import Cond, Nulls, cat, null
from fewstep.core.denoiser import Denoiser, Wrapper, wrapper
from fewstep.core.generator import Generator
from fewstep.core.pipeline import TextConditions
from fewstep.errors import InputError


@wrapper
class CFG(Wrapper):
    """``D(x, null) + scale (D(x, cond) - D(x, null))``: both estimates come from one batch of twice the size.

    ``scale`` 1 is no guidance and costs none. ``nulls`` are the null values of conditions other than ``label``, see
    :func:`fewstep.core.cond.null`, or a function that makes them when they are first needed. ``negative`` is the prompt
    that they were made of, for files. A call counts as one evaluation of the guided denoiser.

    Raises:
        InputError: a scale that is negative or not finite, or a condition without a null value.
    """

    def __init__(
        self, denoiser: Denoiser, scale: float, nulls: Nulls | Callable[[], Nulls] | None = None, negative: str = ""
    ) -> None:
        super().__init__(denoiser)
        _check(scale, negative)
        self.scale, self.nulls = float(scale), nulls
        if negative:
            self.negative = negative

    @classmethod
    def rebuilt(cls, denoiser: Denoiser, fields: Mapping[str, Any], conds: Any) -> CFG:
        """See :meth:`Wrapper.rebuilt`: the null values are those of the generator's own conditions."""
        known = {k: fields[k] for k in ("scale", "negative") if k in fields}
        return cls(denoiser, nulls=_nulls(conds, known.get("negative", "")), **known)

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :class:`fewstep.core.denoiser.Denoiser`."""
        if self.scale == 1 or not cond:
            return self.denoiser(x, sigma, cond)
        if isinstance(sigma, Tensor) and sigma.ndim:
            sigma = torch.cat([sigma, sigma]) if len(sigma) == len(x) else sigma
        if callable(self.nulls):
            self.nulls = self.nulls()
        both = self.denoiser(torch.cat([x, x]), sigma, cat([null(cond, self.nulls), dict(cond)]))
        free, own = both.chunk(2)
        return torch.lerp(free, own, self.scale)


def _check(scale: Any, negative: Any) -> None:
    number = float(scale) if isinstance(scale, Real) and not isinstance(scale, bool) else math.nan
    if not 0 <= number < math.inf:
        raise InputError(f"guidance needs a scale >= 0 (1 is none), got {scale!r}")
    if not isinstance(negative, str):
        raise InputError(f"a negative prompt is a text, got {negative!r}")


def guided(generator: Generator, scale: float, negative: str = "") -> Generator:
    """The generator under classifier-free guidance; itself for scale 1.

    ``negative`` is a prompt to move away from, where the generator reads prompts.

    Raises:
        InputError: an unconditional generator, a bad scale, or a negative prompt where there are none.
    """
    _check(scale, negative)
    if negative and not isinstance(generator.conds, TextConditions):
        raise InputError(f"this generator reads no prompts: it cannot move away from {negative!r}")
    if scale == 1:
        return generator
    if generator.conds is None:
        raise InputError(f"--guidance {scale:g} needs a generator with classes or prompts: this one is unconditional")
    return replace(generator, denoiser=CFG(generator.denoiser, scale, _nulls(generator.conds, negative), negative))


def _nulls(conds: Any, negative: str) -> Callable[[], Nulls] | None:
    """What makes the null values of a generator's conditions; labels have their own."""
    return (lambda: conds.nulls(negative)) if isinstance(conds, TextConditions) else None
