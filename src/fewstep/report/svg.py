"""Figures as SVG elements that can stand beside each other inside one HTML page."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fewstep.report.plots import INK, inked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCES = ("clip-path", "href", "fill", "style")


def inline_svg(figure: Figure, uid: str, label: str, *, natural: bool = False) -> Markup:
    """The figure as one ``<svg>`` element with text as text, the page's text colour, and ids that begin with ``uid``.

    ``label`` is what a screen reader says. ``natural=True`` keeps the figure's own size; otherwise it is as wide as the
    page lets it be.
    """
    held = io.StringIO()
    with inked(), matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        # A name may hold letters that the font lacks: the browser has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        _lay_out(figure)
        figure.savefig(held, format="svg", transparent=True)
    root = ElementTree.fromstring(held.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # The style sheet of one figure would hold for the whole page.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        _rewrite(element, uid)
    size = {key: root.attrib.pop(key) for key in ("width", "height")}
    root.attrib |= {"role": "img", "aria-label": label, "style": "stroke-linejoin:round;stroke-linecap:butt"}
    if natural:
        root.attrib["style"] += f";width:{size['width']}"
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _lay_out(figure: Figure) -> None:
    """Places the axes once and for all: writing would draw everything twice for it, with slow text."""
    FigureCanvasAgg(figure)
    for axis in figure.axes:
        for text in axis.texts:
            text.set_in_layout(False)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def _rewrite(element: ElementTree.Element, uid: str) -> None:
    """Drops namespaces, which HTML does without, and makes ids and the references to them this figure's own."""
    element.tag = element.tag.rpartition("}")[2]
    attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    if element.tag == "g":
        attributes.pop("id", None)
    for key, value in attributes.items():
        if key == "id":
            attributes[key] = f"{uid}-{value}"
        elif key == "href" and value.startswith("#"):
            attributes[key] = f"#{uid}-{value[1:]}"
        elif key in REFERENCES:
            attributes[key] = value.replace("url(#", f"url(#{uid}-").replace(INK, "currentColor")
    element.attrib.clear()
    element.attrib.update(attributes)
