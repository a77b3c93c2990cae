"""A local page that puts generators side by side: the same seeds and conditions, with time and evaluations.

``fewstep serve`` starts it. :class:`Served` is what stands behind it, a function from a :class:`Request` to pictures
and facts, and needs no browser; :func:`page` and :func:`serve` need gradio (``pip install 'fewstep[web]'``).
"""

from fewstep.serve.app import page, serve
from fewstep.serve.request import OWN, UPLOADED, Limits, Panel, Path, Request, Stage, read_table
from fewstep.serve.served import Served

__all__ = ["OWN", "UPLOADED", "Limits", "Panel", "Path", "Request", "Served", "Stage", "page", "read_table", "serve"]
