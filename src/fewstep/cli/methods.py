"""``fewstep methods``: what can be distilled."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from torch import Tensor, nn

from fewstep.core.cond import Batch, Classes
from fewstep.core.denoiser import Precond, edm
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.options import FitOptions
from fewstep.core.path import FLOW
from fewstep.core.role import Ema, Optim, Role
from fewstep.core.state import write_text
from fewstep.distill import METHODS
from fewstep.distill.published import PUBLISHED, SMALL, SMALL_BELOW, scaled
from fewstep.errors import InputError, unknown
from fewstep.grid.karras import karras
from fewstep.models import UNet, UNetConfig
from fewstep.solve.euler import euler
from fewstep.solve.heun import heun

# The network that sizes are told for: 8x8 pictures in three classes.
SIZE = UNetConfig((1, 8, 8), 3, 24, (1, 2), 1, (4,))
EXAMPLES = 16


@dataclass(frozen=True)
class Methods:
    """Lists the methods, or explains one.

    Attributes:
        name: a method, for its roles, memory, settings, defaults and source.
        markdown: writes the list as a Markdown page here.
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    markdown: Path | None = None

    def run(self) -> None:
        """Runs the command."""
        console = Console()
        if self.name is not None and self.name not in METHODS:
            raise unknown("method", self.name, METHODS)
        if self.markdown is not None:
            write_text(self.markdown, markdown())
            return
        if self.name is None:
            shown = Table("method", "data", "steps", "what it is")
            for name, method in METHODS.items():
                shown.add_row(name, "yes" if needs_data(method) else "no", steps_of(method), purpose(method))
            console.print(shown)
            return
        console.print(Markdown(card(self.name)))


def purpose(method: type) -> str:
    """The first line of the file that holds the method: its name and source."""
    return (inspect.getdoc(inspect.getmodule(method)) or "").splitlines()[0]


def needs_data(method: type[Any]) -> bool:
    """Whether the method with its defaults learns from data."""
    return bool(method().needs_data)


def steps_of(method: type[Any]) -> str:
    """How many evaluations one training serves: any number, the one it is trained for, or one by construction."""
    if getattr(method, "any_steps", False):
        return "any"
    return "chosen" if "steps" in asdict(method()) else "1"


def card(name: str) -> str:
    """Purpose, roles, memory, settings, meanings and defaults of a method as Markdown."""
    method = METHODS[name]
    text, told = (inspect.getdoc(method) or "").partition("Attributes:")[0], meanings(method)
    lines = [f"## {name}", "", purpose(method), "", text.strip(), "", *facts(name)]
    lines += ["", "| setting | default | meaning |", "|---|---|---|"]
    for key, value in asdict(method()).items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) if isinstance(value, dict) else value
        lines.append(f"| `{key}` | {shown} | {told[key]} |")
    return "\n".join(lines) + "\n"


def meanings(method: type[Any]) -> dict[str, str]:
    """What each setting is, by the docstring of the class nearest to ``method`` that says so."""
    found: dict[str, str] = {}
    for kind in reversed(method.__mro__):
        attributes = inspect.cleandoc(inspect.cleandoc(kind.__doc__ or "").partition("Attributes:")[2])
        joined = re.sub(r"\n {2,}", " ", attributes)
        found |= dict(re.findall(r"^ *(\w+): (.*)$", joined, re.MULTILINE))
    return found


def facts(name: str) -> list[str]:
    """Lines on the data, the number of evaluations, sources, roles, memory and learning rates of a method."""
    method = METHODS[name]
    told = {
        "any": "one training serves any number of evaluations",
        "chosen": "one training for each number of evaluations",
        "1": "one evaluation",
    }[steps_of(method)]
    papers = sorted(set(re.findall(r"\b\d{4}\.\d{5}\b", inspect.getdoc(inspect.getmodule(method)) or "")))
    lines = [
        f"- Data: {'needed' if needs_data(method) else 'none'}. Evaluations: {told}.",
        f"- Source: {', '.join(f'arXiv {paper}' for paper in papers) or 'none named'}.",
    ]
    try:
        teacher, roles = reference(method)
    except InputError as error:
        return [*lines, f"- Roles and memory: not told, because the reference teacher does not suit it: {error}."]
    size = f"a U-Net of {count(teacher.network) / 1e3:.0f} k parameters"
    try:
        times, source = memory(method, teacher), f"weights, optimizer, averages and gradients, on {size}"
        lines.append(f"- Memory beside activations: {times:.1f} times the teacher's weights ({source}).")
    except InputError as error:
        lines.append(f"- Memory: {error}.")
    row = PUBLISHED.get(name)
    if row is not None:
        made = scaled(method(), teacher)
        rates = ", ".join(f"`{k}` {v:g} published, {getattr(made, k).lr:g} there" for k, v in row.lr.items())
        lines.append(
            f"- Learning rate: {rates}. Published ({row.source}): {row.parameters / 1e6:.3g} M parameters"
            + (f", batch {row.batch}" if row.batch else "")
            + (f", {row.iterations} iterations" if row.iterations else "")
            + (
                "; of LoRA layers, which is no guide for whole networks."
                if row.lora
                else ". Without `--optim.lr` and the like it is carried over by size."
            )
        )
    if name in SMALL:
        told = ", ".join(f"`{path}` {value}" for path, value in SMALL[name].items())
        lines.append(f"- Below {SMALL_BELOW / 1e6:g} M parameters, where they are not given: {told}.")
    lines += ["", "| role | starts as | trained with | averages | ships |", "|---|---|---|---|---|"]
    for key, role in roles.items():
        averages = ", ".join(f"{n} {_width(e)}" for n, e in {"": role.ema, "target": role.target}.items() if e)
        cells = (key, starts_as(role, teacher), _trained(role.optim), averages.strip() or "none")
        lines.append(f"| {' | '.join(cells)} | {'yes' if role.ships else 'no'} |")
    return lines


class Pictures:
    """Random pictures, each with the noise of a pair, for methods of either kind."""

    name = fingerprint = "reference"
    shape = SIZE.shape

    def __init__(self) -> None:
        keyed = Noise.of(0, EXAMPLES)
        self.x, self.noise = keyed.uniform(SIZE.shape, "x") * 2 - 1, keyed.normal(SIZE.shape, "n")
        self.label = torch.arange(EXAMPLES) % 3

    def __len__(self) -> int:
        return EXAMPLES

    def take(self, ids: Tensor) -> Batch:
        """See :class:`fewstep.data.base.Data`."""
        return Batch(self.x[ids], {"label": self.label[ids]}, self.noise[ids])


def teachers() -> dict[str, Generator]:
    """Reference teachers with fresh weights, by their kind: an EDM model and a flow-matching model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = UNet(SIZE), UNet(SIZE)
    classes = Classes((1 / 3,) * 3)
    D = edm(nets[0], SIZE.shape)
    flow = Precond(nets[1], SIZE.shape, path=FLOW, predicts="velocity", sigma_min=1e-3, sigma_max=1e8)
    levels = torch.tensor([1e8, 1.0, 0.0], dtype=torch.float64)
    return {
        "edm": Generator(D, heun(karras(4, D.sigma_min, D.sigma_max)), None, classes),
        "flow": Generator(flow, euler(levels), None, classes),
    }


def reference(method: type[Any]) -> tuple[Generator, Mapping[str, Role]]:
    """The first reference teacher that the method takes, and its roles.

    Raises:
        InputError: it takes none; the message is of the first.
    """
    refused: list[InputError] = []
    for teacher in teachers().values():
        try:
            return teacher, method().roles(teacher)
        except InputError as error:
            refused.append(error)
    raise refused[0]


def memory(method: type[Any], teacher: Generator) -> float:
    """Weights, optimizers, averages and the largest gradients of all roles, as a multiple of the teacher's weights.

    Raises:
        InputError: a method whose step reads values of tensors.
    """
    # Not at the top, because tensors without contents take a second to import.
    from fewstep.train.memory import estimate_memory

    data = Pictures() if needs_data(method) else None
    found = estimate_memory(method(), teacher, data, FitOptions(batch=8)).roles.values()
    kept = sum(role.weights + role.optimizer + role.ema for role in found)
    weights = sum(t.numel() * t.element_size() for t in (*teacher.network.parameters(), *teacher.network.buffers()))
    return (kept + max(role.gradients for role in found)) / weights


def starts_as(role: Role, teacher: Generator) -> str:
    """What a role's network is at first, from its tensors."""
    made, own = role.start(), teacher.network
    if made is own:
        return "the teacher"
    known = {_key(p) for p in own.parameters()}
    same = sum(p.numel() for p in made.parameters() if _key(p) in known)
    extra = count(made) - same
    if same < 0.5 * count(own):
        return f"a new network, {count(made) / count(own):.2f} of the teacher's size"
    return "the teacher's weights" + (f" and {extra / count(own):.0%} new ones" if extra else "")


def _key(p: Tensor) -> tuple[object, ...]:
    """What tells tensors apart: the shape, and sums that no other order of the numbers has."""
    flat = p.detach().double().flatten()
    return tuple(p.shape), float(flat.sum()), float(flat @ torch.arange(len(flat), dtype=torch.float64))


def count(network: nn.Module) -> int:
    """Numbers that a network trains."""
    return sum(p.numel() for p in network.parameters())


def _trained(optim: Optim | None) -> str:
    return "nothing" if optim is None else f"Adam {optim.lr:g}, {optim.decay}"


def _width(ema: Ema) -> str:
    return f"rate {ema.rate:g}" if ema.rate is not None else f"power {ema.power:g}"


def markdown() -> str:
    """The page of all methods."""
    head = "# Methods\n\n"
    return head + "\n".join(card(name) for name in METHODS)
