"""``fewstep export``: a generator as a diffusers folder that runs where fewstep is not installed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from fewstep.cli.base import SamplerFlags, SourceFlags
from fewstep.core.generator import Generator
from fewstep.core.state import read_json
from fewstep.errors import InputError


@dataclass(frozen=True)
class Export:
    """Writes a folder for diffusers, and proves that it makes the same pictures without fewstep.

    Attributes:
        generator: a folder of fewstep or diffusers, a Hub id, or a checkpoint.
        out: the folder to write; GENERATOR-diffusers, or GENERATOR-lora, in the current folder without one.
        scheduler: auto takes a stock scheduler that does exactly the same where there is one; stock insists on it;
            tableau ships fewstep's own in the folder.
        dtype: of the network's weights in the folder; the generator's own without one.
        prompt: pictures of the check are made of these, for text pipelines; may be repeated.
        seed: of the check.
        check: opens the folder in a process without fewstep and compares the pictures; --no-check leaves it out.
        title: of the model card.
        push: also uploads the folder to this Hub repository, OWNER/NAME.
        private: the repository that is made for --push is private.
        device: where the pictures of the check are made.
        tolerance: the largest difference of a pixel, of a range of 1, that the check lets pass.
        lora: GENERATOR is a run that was distilled with --lora: writes the LoRA with its scheduler and card instead,
            checked on its base pipeline.
        base_model: what the card of a LoRA calls its base; where the teacher came from without one.
        overwrite: replaces an earlier export, once the new one is whole.
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
    tolerance: float = 1e-4
    lora: bool = False
    base_model: str | None = None
    overwrite: bool = False
    source: Annotated[SourceFlags, tyro.conf.arg(name="")] = field(default_factory=SourceFlags)
    flags: Annotated[SamplerFlags, tyro.conf.arg(name="")] = field(default_factory=SamplerFlags)

    def run(self) -> None:
        """Runs the command."""
        from fewstep.export.hub import check_repo, push_to_hub
        from fewstep.export.lora_repo import lora_file
        from fewstep.export.verify import PictureDifference

        if self.push is not None:
            check_repo(self.push)
        if self.lora and self.dtype is not None:
            raise InputError("--dtype is for whole pipelines: a LoRA keeps the dtype it was trained in")
        if self.base_model is not None and not self.lora:
            raise InputError("--base-model is for --lora: a whole pipeline has no base to be loaded into")
        if self.lora:
            lora_file(self.generator)
        made = self.flags.guided(self.source.open(self.generator, self.device))
        made = dataclasses.replace(made, sampler=self.flags.resolve(made)[1])
        out = self.out or Path(f"{Path(self.generator).resolve().name}-{'lora' if self.lora else 'diffusers'}")
        err = Console(stderr=True)
        with warnings.catch_warnings(record=True) as said, err.status("export, and a check in a process of its own"):
            warnings.simplefilter("always")
            try:
                self._write(made, out)
            except PictureDifference as error:
                err.print(error.table, highlight=False, soft_wrap=True)
                raise
        self._tell(out, err, [w.message for w in said if issubclass(w.category, UserWarning)])
        if self.push is not None:
            err.print(push_to_hub(out, self.push, private=self.private), highlight=False, soft_wrap=True)

    def _write(self, made: Generator, out: Path) -> None:
        import torch

        from fewstep.export.calls import PROMPTS
        from fewstep.export.lora_repo import export_lora
        from fewstep.export.pipeline import to_diffusers

        options: dict[str, Any] = {
            "scheduler": self.scheduler,
            "check": self.check,
            "prompts": self.prompt or PROMPTS,
            "seed": self.seed,
            "tolerance": self.tolerance,
            "overwrite": self.overwrite,
            "title": self.title,
        }
        if self.lora:
            export_lora(self.generator, out, generator=made, base_model=self.base_model, **options)
        else:
            to_diffusers(made, out, dtype=None if self.dtype is None else getattr(torch, self.dtype), **options)

    def _tell(self, out: Path, err: Console, said: Sequence[Warning | str]) -> None:
        """One line of what was written, after the export's own remarks."""
        for remark in said:
            if str(out) in str(remark):
                err.print(f"note: {remark}", highlight=False, soft_wrap=True)
        facts = read_json(out / "fewstep.json")
        checked = facts["checked"]
        proof = "not checked" if checked is None else f"largest difference {checked['largest_difference']:.1g}"
        told = f"{out}: {facts['scheduler']}, num_inference_steps={facts['num_inference_steps']}, {proof}"
        err.print(told, highlight=False, soft_wrap=True)
