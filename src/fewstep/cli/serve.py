"""``fewstep serve``: a local page that puts generators side by side."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console

from fewstep.cli.base import SourceFlags, check_fits
from fewstep.errors import InputError
from fewstep.serve import Limits, Served, serve
from fewstep.serve.request import names_of


@dataclass(frozen=True)
class Serve:
    """Opens a page in which generators are compared at the same seeds and conditions; Ctrl-C ends it.

    The page fetches nothing from elsewhere and reports nothing, and only this machine reaches it unless --host says
    otherwise. Needs gradio: pip install 'fewstep[web]'.

    Attributes:
        generators: one or more folders of fewstep or diffusers, Hub ids, or checkpoints.
        host: address to listen on; 0.0.0.0 lets the network in, without a password.
        port: to listen on; 0 takes a free one.
        device: cpu, cuda, cuda:1 or mps.
        pictures: at most so many in a panel.
        steps: at most so many of a sampler chosen by name, or evaluations of an uploaded tableau.
        force: runs uploaded tableaux that were fitted to another generator or to other noise levels.
        source: how to open the generators.
    """

    generators: Annotated[tuple[str, ...], tyro.conf.Positional]
    host: str = "127.0.0.1"
    port: int = 7860
    device: str = "cpu"
    pictures: int = 16
    steps: int = 100
    force: bool = False
    source: Annotated[SourceFlags, tyro.conf.arg(name="")] = field(default_factory=SourceFlags)

    def run(self) -> None:
        """Runs the command."""
        if not self.generators:
            raise InputError("there is nothing to serve: name at least one generator (fewstep serve --help)")
        limits, names = Limits(pictures=self.pictures, steps=self.steps), names_of(self.generators)
        said = Console(stderr=True)
        made = {}
        for name, source in zip(names, self.generators, strict=True):
            said.print(f"opening {source}", highlight=False, markup=False, soft_wrap=True)
            made[name] = self.source.open(source, self.device)
        if not _is_local(self.host):
            told = f"everybody who reaches {self.host} can use the page: it has no password"
            said.print(told, highlight=False, markup=False, soft_wrap=True)

        def tell(address: str) -> None:
            said.print(f"{address}   (Ctrl-C ends it)", highlight=False, markup=False, soft_wrap=True)

        served = Served(made, fits=None if self.force else check_fits, limits=limits)
        serve(served, host=self.host, port=self.port, say=tell)


def _is_local(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
