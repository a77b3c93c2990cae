"""What pages of docs/ take for granted, as tiny models: the folders, files and Python names that their blocks use."""

from __future__ import annotations

import functools
import importlib
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fewstep
from edm_files import dump, network_file, tiny_edm
from fewstep.core.state import write_text
from fewstep.data import Images, SuperResolution, digits, load_data, sr_digits
from fewstep.data.conditions import ImageConditions
from fewstep.distill import CD, DMD, TADSR, CoDi, SiD, distill, progressive
from fewstep.models.image_conditioned import image_conditioned
from fewstep.solve.collaboration import Collaboration, oracle_of
from fewstep.train import DMMD, EDMTraining, train, train_dmmd, untrained

QUICK = {"log_every": 1, "save_every": 0, "grid_every": 0, "check_every": 0, "progress": False, "batch": 8}
# A tiny network and few moves in place of the defaults; the batch holds the group of pictures that the loss compares.
SMALL = QUICK | {"net": "resmlp", "features": 8, "reference": 64, "batch": 32, "method": DMMD(steps=2, levels=2)}
SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"


class Shop:
    """Makes what pages take for granted, each once; ``of`` puts it where the page expects it."""

    def __init__(self, place: Path) -> None:
        self.place = place

    @functools.cached_property
    def teacher(self) -> Path:
        start = untrained(load_data("digits"), "resmlp", width=16, embedding=8, blocks=1)
        train(start, EDMTraining(), digits(), out=self.place / "teacher", budget=4, **QUICK)
        return self.place / "teacher"

    @functools.cached_property
    def sid(self) -> Path:
        distill(fewstep.load(self.teacher), SiD(), out=self.place / "sid", budget=2, **QUICK)
        return self.place / "sid"

    @functools.cached_property
    def cd(self) -> Path:
        distill(fewstep.load(self.teacher), CD(), digits(), out=self.place / "cd", budget=2, **QUICK)
        return self.place / "cd"

    @functools.cached_property
    def five(self) -> Path:
        table = fewstep.calibrate(fewstep.load(self.teacher).denoiser, nfe=5)
        write_text(self.place / "five" / "tableau.json", table.to_json())
        return self.place / "five"

    @functools.cached_property
    def sd(self) -> Path:
        from tiny_models import folder_of, stable_diffusion

        return Path(folder_of(stable_diffusion(), self.place / "sd"))

    @functools.cached_property
    def prompts(self) -> Path:
        write_text(self.place / "prompts.txt", "a red fox\na small harbour\na bowl of plums\n")
        return self.place / "prompts.txt"

    @functools.cached_property
    def sd_saved(self) -> Path:
        """A generator's own folder around the pipeline, with its prompts."""
        made = fewstep.load(self.sd, prompts=str(self.prompts), steps=3)
        return made.save(self.place / "sd-saved")

    @functools.cached_property
    def ddim(self) -> Path:
        """The pipeline's own five steps as a table."""
        write_text(self.place / "ddim.json", fewstep.load(self.sd, steps=5).sampler.to_json())
        return self.place / "ddim.json"

    @functools.cached_property
    def flow(self) -> Path:
        levels = fewstep.grid.grid("flow_shift", 4, 0.001, 1e8, shift=3.0)
        write_text(self.place / "flow.json", fewstep.solve.build("euler", levels).to_json())
        return self.place / "flow.json"

    def pickle(self, name: str) -> Path:
        """A tiny file of EDM, or of EDM2, or one whose network is called net."""
        path = self.place / name
        if "edm2" in name:
            return tiny_edm(path, "Precond", "edm2") if not path.exists() else path
        return dump(path, {"net": network_file("EDMPrecond", "ddpmpp")}) if "snapshot" in name else tiny_edm(path)

    def sources(self) -> dict[str, Callable[[], Path]]:
        """Every name that pages use without making it."""
        files = ("edm-cifar10-32x32-cond-vp.pkl", "edm2-img64-s.pkl", "network-snapshot.pkl")
        return {
            **{name: lambda name=name: self.pickle(name) for name in files},  # type: ignore[misc]
            **dict.fromkeys(("runs/teacher", "GENERATOR", "TEACHER", "FOLDER", "teacher"), lambda: self.teacher),
            **dict.fromkeys(("runs/sid", "STUDENT", "runs/distill-sid-001", "runs/sfd"), lambda: self.sid),
            "runs/cd": lambda: self.cd,
            "runs/five": lambda: self.five,
            "fitted.json": lambda: self.five / "tableau.json",
            **dict.fromkeys((SD, "runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5"), lambda: self.sd),
            "stable-diffusion/scheduler": lambda: self.sd / "scheduler",
            "pipeline/scheduler": lambda: self.sd / "scheduler",
            "prompts.txt": lambda: self.prompts,
            **dict.fromkeys(("table.json", "ours.json"), lambda: self.ddim),
            "flow.json": lambda: self.flow,
        }

    def furnish(self, page: str, text: str, folder: Path) -> None:
        """Links what the page's blocks name and do not make themselves."""
        sources = self.sources()
        if page == "memory.md":
            # flags of LoRA name layers of diffusers; RUN is the run that the page makes
            sources["FOLDER"] = lambda: self.sd_saved
            (folder / "RUN").symlink_to("runs/distill-sid-001")
        for name, make in sources.items():
            word = rf"{re.escape(name)}(?![\w-]|/stable)"
            if not re.search(rf"(?<![\w./-]){word}", text) or re.search(rf'(--out |-o |out="){word}', text):
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if (folder / name).exists():
                # one name lies in another, which is a folder of its own
                shutil.copytree(make(), folder / name, dirs_exist_ok=True)
            else:
                (folder / name).symlink_to(make())

    def names(self, page: str) -> dict[str, Any]:
        """What the Python of a page uses without importing or making it."""
        return {name: make() for name, make in self.given().get(page, {}).items()}

    def given(self) -> dict[str, dict[str, Callable[[], Any]]]:
        """By page."""

        def student() -> Any:
            return fewstep.load(self.cd)

        def pictures() -> Any:
            return digits().take(torch.arange(4)).x

        def plain() -> Images:
            return Images("plain", digits().take(torch.arange(64)).x)

        quick = functools.partial(train, **QUICK)
        quickly = functools.partial(distill, **QUICK)
        known = (replace, untrained, image_conditioned, ImageConditions, load_data, EDMTraining, SuperResolution)
        own: dict[str, Callable[[], Any]] = {x.__name__: lambda x=x: x for x in (*known, DMD, TADSR, CoDi, CD)}  # type: ignore[misc]
        own |= {"train": lambda: quick, "distill": lambda: quickly}
        return {
            "memory.md": {
                "method": SiD, "teacher": lambda: fewstep.load(self.teacher), "fewstep": lambda: fewstep,
                "sibling": lambda: fewstep.load(self.sd_saved),
            },
            "export.md": {"student": lambda: fewstep.load(self.sd_saved), "guided": lambda: fewstep.guided},
            "export-samplers.md": {
                "table": lambda: fewstep.Tableau.from_json(self.ddim.read_text()), "prompt": lambda: "a red fox",
                "pipe": self.pipe, "diffusers": lambda: importlib.import_module("diffusers"),
            },
            "cards/consistency.md": {
                "student": student, "pictures": pictures, "labels": lambda: torch.arange(4),
                "mask": lambda: (torch.arange(8) < 4).float().expand(1, 8, 8),
            },
            "cards/collaboration.md": {
                "student": student, "teacher": lambda: fewstep.load(self.teacher), "oracle_of": lambda: oracle_of,
                "Collaboration": lambda: Collaboration,
            },
            "cards/dmd.md": {**own, "teacher": lambda: fewstep.load(self.teacher)},
            "cards/dmmd.md": {
                "train_dmmd": lambda: functools.partial(train_dmmd, **SMALL), "digits": lambda: digits,
            },
            "cards/adversarial-consistency.md": own,
            "cards/perceptual.md": own,
            "cards/codi.md": {
                **own, "teacher": lambda: untrained(plain(), "unet", channels=8), "data": plain,
            },
            "cards/progressive.md": {
                "teacher": lambda: fewstep.load(self.teacher), "data": digits,
                "progressive": lambda: functools.partial(progressive, **QUICK),
            },
            "cards/tad-sr.md": {
                **own, "data": lambda: sr_digits(64), "generator": lambda: untrained(sr_digits(64), "unet", channels=8),
                "small": lambda: sr_digits(64).take(torch.arange(3)).cond["image"],
            },
            "cards/snoopi.md": {"student": lambda: fewstep.load(self.sd_saved)},
        }  # fmt: skip

    def pipe(self) -> Any:
        """The tiny pipeline as diffusers opens it."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline.from_pretrained(self.sd)
