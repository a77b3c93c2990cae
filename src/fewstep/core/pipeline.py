"""What surrounds a network: the latent space, where conditions come from, and how both are found again from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from fewstep.core.cond import Cond, Nulls
from fewstep.core.noise import Noise
from fewstep.errors import InputError, unknown


class Codec(Protocol):
    """A latent space."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, ...) as the denoiser makes them -> pictures (B, C, H, W) in [-1, 1]."""
        ...

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1] -> latents (B, ...) as the denoiser sees them; the mean, nothing drawn."""
        ...


class Conditions(Protocol):
    """Where the conditions of samples come from."""

    def draw(self, noise: Noise) -> dict[str, Tensor]:
        """One condition per source, a function of its seed alone.

        Raises:
            InputError: there is nothing to draw from, such as a text pipeline without prompts.
        """
        ...

    def check(self, cond: Cond) -> None:
        """Raises InputError for conditions that the denoiser cannot take."""
        ...


@runtime_checkable
class TextConditions(Protocol):
    """:class:`Conditions` that are made of prompts."""

    def draw(self, noise: Noise) -> dict[str, Tensor]:
        """See :class:`Conditions`."""
        ...

    def check(self, cond: Cond) -> None:
        """See :class:`Conditions`."""
        ...

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The conditions of these prompts."""
        ...

    def nulls(self, negative: str = "") -> Nulls:
        """What classifier-free guidance moves away from: the conditions of the empty or of a negative prompt."""
        ...


class Pipeline(Protocol):
    """Codec and conditions that live beside the network, such as a diffusers folder; ``kind`` is its name in files."""

    kind: ClassVar[str]

    @property
    def codec(self) -> Codec | None:
        """The latent space; None for pixel models."""
        ...

    @property
    def conds(self) -> Conditions | None:
        """Where conditions come from; None for unconditional models."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-able: what :func:`open_pipeline` finds it by."""
        ...

    def to(self, device: torch.device) -> Any:
        """Moves what it has loaded, and will load, to a device."""
        ...


Opener = Callable[[Mapping[str, Any], torch.device], Pipeline]
O = TypeVar("O", bound=Opener)  # noqa: E741
PIPELINES: dict[str, Opener] = {}


def pipeline(kind: str) -> Callable[[O], O]:
    """Function decorator: opens descriptions of this kind, on a device."""

    def add(opener: O) -> O:
        PIPELINES[kind] = opener
        return opener

    return add


def open_pipeline(description: Mapping[str, Any], device: torch.device) -> Pipeline:
    """The pipeline that :meth:`Pipeline.describe` described.

    Raises:
        InputError: an unknown kind, or its parts are not where the description says.
    """
    fields = dict(description)
    kind = str(fields.pop("kind", None))
    if kind not in PIPELINES:
        raise unknown("kind of pipeline", kind, PIPELINES)
    try:
        return PIPELINES[kind](fields, device)
    except (KeyError, TypeError) as error:
        raise InputError(f"the description of a {kind!r} pipeline lacks or garbles {error}") from None


class StoredConditions(Conditions, Protocol):
    """:class:`Conditions` that a generator's own folder holds, without a pipeline; ``kind`` is their name in files."""

    kind: ClassVar[str]

    @classmethod
    def opened(cls, fields: Mapping[str, Any]) -> Any:
        """From what :meth:`describe` told."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-able: what :meth:`opened` makes them from."""
        ...


K = TypeVar("K", bound=type[Any])
CONDITIONS: dict[str, type[Any]] = {}


def conditions(kind: str) -> Callable[[K], K]:
    """Class decorator: a generator's folder may hold these :class:`StoredConditions`, under ``kind``."""

    def add(cls: K) -> K:
        cls.kind = kind
        CONDITIONS[kind] = cls
        return cls

    return add


def stored_conditions(conds: Any) -> dict[str, Any] | None:
    """The description of conditions that a generator's folder may hold; None for others."""
    kind = getattr(conds, "kind", None)
    return {"kind": kind, **conds.describe()} if kind in CONDITIONS and type(conds) is CONDITIONS[kind] else None


def open_conditions(description: Mapping[str, Any]) -> Conditions:
    """The conditions that :func:`stored_conditions` described.

    Raises:
        InputError: an unknown kind, or fields that do not belong.
    """
    fields = dict(description)
    kind = str(fields.pop("kind", None))
    if kind not in CONDITIONS:
        raise unknown("kind of conditions", kind, CONDITIONS)
    try:
        made: Conditions = CONDITIONS[kind].opened(fields)
        return made
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the description of {kind!r} conditions lacks or garbles {error}") from None
