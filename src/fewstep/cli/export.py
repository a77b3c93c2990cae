"""``fewstep export``: a generator as a diffusers folder that runs where fewstep is not installed."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from fewstep.cli.base import SamplerFlags, SourceFlags
from fewstep.core.state import read_json


@dataclass(frozen=True)
class Export:
    """Writes a folder for diffusers, and proves that it makes the same pictures without fewstep.

    Attributes:
        generator: a folder of fewstep or diffusers, a Hub id, or a checkpoint.
        out: the folder to write; <generator>-diffusers without one.
        scheduler: auto takes a stock scheduler that does exactly the same where there is one; stock insists on it;
            tableau ships fewstep's own in the folder.
        dtype: of the weights in the folder; the generator's own without one.
        prompt: pictures of the check are made of these, for text pipelines; may be repeated.
        seed: of the check.
        check: opens the folder in a process without fewstep and compares the pictures; --no-check leaves it out.
        title: of the model card.
        push: also uploads the folder to this Hub repository, OWNER/NAME.
        private: the repository that is made for --push is private.
        device: where fewstep's own pictures of the check are made.
        overwrite: replaces an earlier export.
        source: how to open the generator.
        flags: the sampler and guidance to export instead of the generator's own.
    """

    generator: Annotated[str, tyro.conf.Positional]
    out: Path | None = None
    scheduler: Literal["auto", "stock", "tableau"] = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    seed: int = 0
    check: bool = True
    title: str | None = None
    push: str | None = None
    private: bool = False
    device: str = "cpu"
    overwrite: bool = False
    source: Annotated[SourceFlags, tyro.conf.arg(name="")] = field(default_factory=SourceFlags)
    flags: Annotated[SamplerFlags, tyro.conf.arg(name="")] = field(default_factory=SamplerFlags)

    def run(self) -> None:
        """Runs the command."""
        import torch

        from fewstep.export.calls import PROMPTS
        from fewstep.export.hub import check_repo, push_to_hub
        from fewstep.export.pipeline import FACTS, to_diffusers

        if self.push is not None:
            check_repo(self.push)
        made = self.flags.guided(self.source.open(self.generator, self.device))
        _, sampler = self.flags.resolve(made)
        out = self.out or Path(f"{Path(self.generator).name}-diffusers")
        err = Console(stderr=True)
        with warnings.catch_warnings(record=True) as said, err.status("export, and a check in a process of its own"):
            warnings.simplefilter("always")
            to_diffusers(
                dataclasses.replace(made, sampler=sampler),
                out,
                scheduler=self.scheduler,
                dtype=None if self.dtype is None else getattr(torch, self.dtype),
                check=self.check,
                prompts=self.prompt or PROMPTS,
                seed=self.seed,
                overwrite=self.overwrite,
                title=self.title,
            )
        facts = read_json(out / FACTS)
        checked = facts["checked"]
        proof = "not checked" if checked is None else f"largest difference {checked['largest_difference']:.1g}"
        told = f"{out}: {facts['scheduler']}, num_inference_steps={facts['num_inference_steps']}, {proof}"
        err.print(told, highlight=False, soft_wrap=True)
        for warning in said:
            if issubclass(warning.category, UserWarning) and str(out) in str(warning.message):
                err.print(f"note: {warning.message}", highlight=False, soft_wrap=True)
        if self.push is not None:
            err.print(push_to_hub(out, self.push, private=self.private), highlight=False, soft_wrap=True)
