"""What a network of diffusers reads beside the picture, and the check of conditions against it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.errors import InputError, unknown


class Need(NamedTuple):
    """A condition that a network reads: its shape per example, None for a length, and whether it can be left out.

    All lengths of one network are the same number: of tokens. ``kind`` is "floating", "integer" (labels) or "any"
    (masks).
    """

    shape: tuple[int | None, ...]
    optional: bool = False
    kind: str = "floating"


def check_conditions(needs: Mapping[str, Need], cond: Cond) -> None:
    """Raises InputError for conditions that the network cannot read.

    That is one missing, unknown, of another type or shape, or of another batch or number of tokens than the others.
    """
    for name in cond:
        if name not in needs:
            raise unknown("condition", str(name), needs)
    lengths: dict[str, int] = {}
    for name, need in needs.items():
        if name in cond:
            lengths |= _lengths(name, need, cond[name])
        elif not need.optional:
            raise InputError(f"the condition {name!r} is missing: this network reads {', '.join(needs)}")
    batches = {name: len(value) for name, value in cond.items()}
    for what, found in (("examples", batches), ("tokens", lengths)):
        if len(set(found.values())) > 1:
            said = ", ".join(f"{name!r} has {n}" for name, n in found.items())
            raise InputError(f"conditions must agree in their number of {what}: {said}")


def _lengths(name: str, need: Need, value: object) -> dict[str, int]:
    """The number of tokens of a condition under its name, if it has one; raises InputError for what does not fit."""
    if not isinstance(value, Tensor):
        raise InputError(f"the condition {name!r} must be a tensor, got a {type(value).__name__}")
    own = tuple(value.shape)[1:]
    fits = value.ndim == 1 + len(need.shape) and all(n in (None, m) for n, m in zip(need.shape, own, strict=True))
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in ("B", *need.shape))
        raise InputError(f"the condition {name!r} must be ({wanted}), got {tuple(value.shape)}")
    whole = not (value.is_floating_point() or value.is_complex() or str(value.dtype) == "torch.bool")
    if (need.kind == "floating" and not value.is_floating_point()) or (need.kind == "integer" and not whole):
        raise InputError(f"the condition {name!r} must be of {need.kind} dtype, got {value.dtype}")
    return {name: own[need.shape.index(None)]} if None in need.shape else {}
