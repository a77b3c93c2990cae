"""Our own networks as one self-contained Python file, and as a diffusers repository that carries its code."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.core.denoiser import PRECONDITIONINGS, Precond
from fewstep.core.network import NETWORKS
from fewstep.core.state import save_tensors, write_text
from fewstep.errors import InputError
from fewstep.export.collect import HOME, Bundle

INDEX = "model_index.json"
MODELING, WEIGHTS = "modeling_fewstep", "diffusion_pytorch_model.safetensors"


def bundle_network(net: nn.Module) -> str:
    """The source of one Python file that defines the class of ``net``, its configuration and all that they need.

    It imports torch, numpy and the standard library, nothing else; docstrings and comments are kept. Where two modules
    have a private name in common the later one is renamed after its module. The class is made as in the library,
    ``UNet(UNetConfig(...))``, and takes the same weights.

    Raises:
        InputError: a network that is not registered, or one whose source is not a module of fewstep.
    """
    bundle = Bundle()
    kind, cls, config = _registered(net)
    bundle.add(config.__module__, config.__name__)
    bundle.add(cls.__module__, cls.__name__)
    return bundle.text(f"The network {cls.__name__} ({kind}) of fewstep (Apache-2.0), in one file.")


def _registered(net: nn.Module) -> tuple[str, type[nn.Module], type]:
    for kind, (cls, config) in NETWORKS.items():
        if type(net) is cls:
            if cls.__module__.split(".")[0] != HOME:
                raise InputError(
                    f"{cls.__module__}.{cls.__name__} is no network of fewstep: its source is not ours to copy"
                )
            return kind, cls, config
    raise InputError(f"{type(net).__name__} cannot be written as a file: only {', '.join(sorted(NETWORKS))} can")


def bundle_denoiser(denoiser: Precond) -> str:
    """:func:`bundle_network` with the preconditioning and ``FewstepDenoiser``, a diffusers model around them.

    The class is that of :mod:`fewstep.export.modeling`; its ``forward(sample, sigma, class_labels)`` is
    ``Precond.forward``, copied and not written again. The file also needs diffusers.

    Raises:
        InputError: see :func:`bundle_network`; or something that is not a Precond.
    """
    if not isinstance(denoiser, Precond):
        raise InputError(
            f"a {type(denoiser).__name__} cannot be written as a file: only a Precond can (take guidance off first)"
        )
    kind, cls, config = _registered(denoiser.net)
    own = type(denoiser)
    if PRECONDITIONINGS.get(own.kind) is not own:
        raise InputError(
            f"{own.__name__} is no registered preconditioning: choose one of {', '.join(PRECONDITIONINGS)}"
        )
    bundle = Bundle()
    added = [bundle.add(c.__module__, c.__name__) for c in (cls, config, own)]
    bundle.add("fewstep.export.modeling", "FewstepDenoiser")
    tables = [
        bundle.add(m, n)
        for m, n in (("fewstep.core.network", "NETWORKS"), ("fewstep.core.denoiser", "PRECONDITIONINGS"))
    ]
    names = bundle.names()
    net, made, around, networks, kinds = (names[e] for e in (*added, *tables))
    tail = f'{networks}["{kind}"] = ({net}, {made})\n{kinds}["{own.kind}"] = {around}'
    return bundle.text(f"{cls.__name__} of fewstep (Apache-2.0) as a denoiser for diffusers, in one file.", tail)


def write_custom_pipeline(denoiser: Precond, scheduler: Any, folder: str | Path, *, classes: int = 0) -> Path:
    """Writes a pixel model as a diffusers folder that carries its own code.

    ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` opens it with torch and diffusers alone. It
    holds ``pipeline.py`` (:class:`fewstep.export.custom_pipeline.FewstepPipeline`), ``denoiser/`` with code,
    configuration and weights, and ``scheduler/``. ``model_index.json`` is written last: without it the folder does not
    count as a pipeline. ``scheduler`` works on ``x = x0 + sigma n`` and takes x0: a ``TableauScheduler`` with
    ``path="edm"`` and ``prediction_type="sample"``. ``classes`` is the number of labels, 0 for none.

    Raises:
        InputError: a denoiser that cannot be bundled, a scheduler for another kind of model or whose code needs
            fewstep, classes below 0, or a place that cannot be written.
    """
    if classes < 0:
        raise InputError(f"classes must be 0 (none) or more, got {classes}")
    diffusers = need_diffusers()
    code = bundle_denoiser(denoiser)
    library, scheduler_code = _scheduler_code(scheduler)
    folder = Path(folder)
    pipeline = Path(__file__).with_name("custom_pipeline.py").read_text()
    config = {
        "_class_name": "FewstepDenoiser",
        "_diffusers_version": diffusers.__version__,
        "classes": classes,
        "description": denoiser.describe(),
    }
    index = {
        "_class_name": ["pipeline", "FewstepPipeline"],
        "_diffusers_version": diffusers.__version__,
        "denoiser": [MODELING, "FewstepDenoiser"],
        "scheduler": [library, type(scheduler).__name__],
    }
    try:
        # An older export is no pipeline while its files change.
        (folder / INDEX).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}: choose another folder") from None
    write_text(folder / "pipeline.py", pipeline)
    write_text(folder / "denoiser" / f"{MODELING}.py", code)
    write_text(folder / "denoiser" / "config.json", json.dumps(config, indent=2) + "\n")
    weights = {f"denoiser.{name}": tensor for name, tensor in denoiser.state_dict().items()}
    save_tensors(folder / "denoiser" / WEIGHTS, weights, {"format": "pt"})
    write_text(folder / "scheduler" / "scheduler_config.json", scheduler.to_json_string())
    if scheduler_code is not None:
        write_text(folder / "scheduler" / f"{library}.py", scheduler_code)
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return folder


def need_diffusers() -> Any:
    """The diffusers package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import diffusers
    except ImportError:
        raise InputError("diffusers is not installed: pip install 'fewstep[hf]'") from None
    return diffusers


def _scheduler_code(scheduler: Any) -> tuple[str, str | None]:
    """The library that ``model_index.json`` names for a scheduler, and its file where it brings its own."""
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    config = getattr(scheduler, "config", {})
    if not isinstance(scheduler, SchedulerMixin):
        raise InputError(
            f"expected a scheduler of diffusers, got a {type(scheduler).__name__}: make a TableauScheduler"
        )
    said = {key: config.get(key) for key in ("path", "prediction_type")}
    if said != {"path": "edm", "prediction_type": "sample"}:
        raise InputError(
            f"the scheduler of a custom pipeline works on x0 + sigma n and takes x0 (path='edm', "
            f"prediction_type='sample'), got path={said['path']!r} and prediction_type={said['prediction_type']!r}"
        )
    # A subclass that only adds ways to make one is shipped as the class that runs.
    name = type(scheduler).__name__
    for cls in (c for c in type(scheduler).__mro__ if c.__name__ == name):
        file = Path(inspect.getfile(cls))
        code = file.read_text()
        if not _needs_more(code):
            return file.stem, code
    raise InputError(f"{file.name} imports more than diffusers and torch: its {name} cannot be shipped")


def _needs_more(code: str) -> bool:
    """Whether a file imports this library, or files beside it."""
    for node in ast.walk(ast.parse(code)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == HOME for name in names) or (isinstance(node, ast.ImportFrom) and node.level):
            return True
    return False
