"""Pictures and facts as HTML that is whole in itself: every picture is in it, and nothing is fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from torch import Tensor

from fewstep.report.pictures import grid_image
from fewstep.serve.request import Panel, Path, Request

# Below this many pixels a picture is enlarged in whole squares, because blurring it would show what is not there.
SMALL = 96


def panels_html(panels: Sequence[Panel], request: Request) -> str:
    """The panels side by side, with time, evaluations and notes."""
    return _render("panels.html.j2", panels=panels, request=request)


def paths_html(paths: Sequence[Path], number: int) -> str:
    """A strip of states and one of predictions for each trajectory of picture ``number`` (from 0)."""
    return _render("paths.html.j2", paths=paths, number=number)


def error_html(message: str, lead: str = "Nothing was made.") -> str:
    """One line that says what is wrong, after ``lead``, which says what that means."""
    return _render("error.html.j2", message=message, lead=lead)


def style() -> str:
    """The style sheet of what this module makes; its colours are those of the page's theme, light and dark."""
    return _folder().joinpath("style.css").read_text("utf-8")


def source_of(picture: Tensor) -> str:
    """A picture (C, H, W) in [-1, 1] as a data URL of a PNG of its own size."""
    held = io.BytesIO()
    grid_image(picture[None], 1, side=max(picture.shape[1:]), gap=0).save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def duration(seconds: float) -> str:
    """A time with three digits: ``"1.23 ms"``, ``"45.6 s"``."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _render(name: str, **fields: Any) -> str:
    return _environment().get_template(name).render(**fields)


def _folder() -> Any:
    return resources.files("fewstep.serve")


@cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _folder().joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"source": source_of, "duration": duration}
    made.tests["small"] = lambda picture: max(picture.shape[1:]) < SMALL
    return made
