"""Samplers as files: a tableau is one JSON file; others are folders of JSON and safetensors, opened by their kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from fewstep.core.sample import Sampler
from fewstep.core.state import load_tensors, read_json, save_tensors, write_text
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown

FORMAT = "fewstep-sampler/1"
FILE, TENSORS = "sampler.json", "sampler.safetensors"


@runtime_checkable
class Stored(Protocol):
    """A sampler that can be written as JSON-able fields and named tensors, and made from them again."""

    kind: str

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Fields and tensors."""
        ...

    @classmethod
    def from_parts(cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sampler:
        """The inverse of :meth:`parts`; raises InputError for parts that do not belong."""
        ...


Kind = TypeVar("Kind", bound=type)
KINDS: dict[str, Any] = {}


def stored(kind: str) -> Callable[[Kind], Kind]:
    """Class decorator: the sampler is known to files under ``kind``."""

    def add(cls: Kind) -> Kind:
        cls.kind = kind  # type: ignore[attr-defined]
        KINDS[kind] = cls
        return cls

    return add


def save_sampler(sampler: Sampler, place: str | Path) -> Path:
    """Writes a tableau to ``place`` (or ``place/tableau.json`` when it has no .json suffix), others to a folder.

    Returns what :func:`load_sampler` opens. Raises InputError for a sampler that cannot be stored.
    """
    place = Path(place)
    if isinstance(sampler, Tableau):
        file = place if place.suffix == ".json" else place / "tableau.json"
        write_text(file, sampler.to_json() + "\n")
        return file
    if not isinstance(sampler, Stored):
        raise InputError(f"a {type(sampler).__name__} cannot be stored: only tableaux and {sorted(KINDS)} can")
    fields, tensors = sampler.parts()
    if tensors:
        save_tensors(place / TENSORS, tensors)
    # Last, because a folder counts as a sampler once this file is there.
    write_text(place / FILE, json.dumps({"format": FORMAT, "kind": sampler.kind, "fields": fields}) + "\n")
    return place


def load_sampler(place: str | Path) -> Sampler:
    """Opens what :func:`save_sampler` wrote: a .json, or a folder that holds a tableau or another sampler.

    Raises:
        InputError: nothing is there, it is no sampler, or it is damaged.
    """
    place = Path(place)
    if place.is_dir() and not (place / FILE).is_file():
        place = place / "tableau.json"
    if not place.exists():
        raise InputError(f"{place} does not exist: expected a tableau's .json or the folder of a sampler")
    if place.is_file():
        try:
            return Tableau.from_json(place.read_text())
        except UnicodeDecodeError:
            raise InputError(f"{place} is not a tableau: it is not text") from None
    body = read_json(place / FILE)
    if body.get("format") != FORMAT or set(body) != {"format", "kind", "fields"}:
        raise InputError(f"{place / FILE} is not a sampler: expected format {FORMAT!r}, got {body.get('format')!r}")
    if body["kind"] not in KINDS:
        raise unknown("kind of sampler", body["kind"], KINDS)
    tensors = load_tensors(place / TENSORS) if (place / TENSORS).is_file() else {}
    try:
        return KINDS[body["kind"]].from_parts(body["fields"], tensors)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(f"{place} is damaged: its {FILE} or {TENSORS} lacks or garbles {error}") from None
