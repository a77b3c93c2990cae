"""The front door of distillation, and the table of its methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.core.cond import Classes
from fewstep.core.fit import Data
from fewstep.core.generator import Generator
from fewstep.core.options import Budget
from fewstep.core.role import Method
from fewstep.data.conditions import ConditionsOnly
from fewstep.distill.adversarial_consistency import AdversarialCD
from fewstep.distill.boot import BOOT
from fewstep.distill.codi import CoDi
from fewstep.distill.consistency import CD
from fewstep.distill.consistency_training import CT, ECT
from fewstep.distill.ctm import CTM
from fewstep.distill.disback import DisBack
from fewstep.distill.dmd import DMD
from fewstep.distill.dmd2 import DMD2
from fewstep.distill.emd import EMD
from fewstep.distill.f_distill import FDistill
from fewstep.distill.flash_diffusion import FlashDiffusion
from fewstep.distill.get import GETDistillation
from fewstep.distill.icd import ICD
from fewstep.distill.imagine_flash import ImagineFlash
from fewstep.distill.mean_flow import MeanFlow
from fewstep.distill.msd import MSD
from fewstep.distill.progressive import Progressive
from fewstep.distill.reflow import Reflow
from fewstep.distill.sana_sprint import SanaSprint
from fewstep.distill.scflow import SCFlow
from fewstep.distill.scm import SCM
from fewstep.distill.score_forgetting import ScoreForgetting
from fewstep.distill.sdxs import SDXS
from fewstep.distill.sfd import SFD, SFDOne, SFDv
from fewstep.distill.sid import SiD
from fewstep.distill.sida import SiDA
from fewstep.distill.slimflow import SlimFlow
from fewstep.distill.snoopi import SNOOPI
from fewstep.distill.swiftbrush import SwiftBrush
from fewstep.distill.tad_sr import TADSR
from fewstep.distill.tdd import TDD
from fewstep.distill.vsd import VSD
from fewstep.errors import InputError
from fewstep.train.run import train

METHODS: dict[str, type[Any]] = {
    "progressive": Progressive,
    "cd": CD,
    "ct": CT,
    "ect": ECT,
    "ctm": CTM,
    "scm": SCM,
    "mean-flow": MeanFlow,
    "sfd": SFD,
    "sfd-v": SFDv,
    "sfd-one": SFDOne,
    "tdd": TDD,
    "icd": ICD,
    "boot": BOOT,
    "get": GETDistillation,
    "reflow": Reflow,
    "slimflow": SlimFlow,
    "scflow": SCFlow,
    "sana-sprint": SanaSprint,
    "imagine-flash": ImagineFlash,
    "flash-diffusion": FlashDiffusion,
    "codi": CoDi,
    "adversarial-consistency": AdversarialCD,
    "vsd": VSD,
    "swiftbrush": SwiftBrush,
    "snoopi": SNOOPI,
    "sdxs": SDXS,
    "dmd": DMD,
    "dmd2": DMD2,
    "f-distill": FDistill,
    "disback": DisBack,
    "emd": EMD,
    "msd": MSD,
    "sid": SiD,
    "sida": SiDA,
    "score-forgetting": ScoreForgetting,
    "tad-sr": TADSR,
}


def distill(
    teacher: Generator,
    method: Method,
    data: Data | None = None,
    *,
    out: str | Path,
    budget: str | int | Budget,
    **options: Any,
) -> Generator:
    """Distils ``teacher`` with ``method`` and returns the student, which ``out`` then holds.

    ``options`` are those of :func:`fewstep.train.run.train`: seed, batch, micro, bf16, device, resume, overwrite,
    lora, lora_roles, checkpointing, offload ...

    Raises:
        InputError: data missing where the method learns from data, or given where it learns from none.
        NonFiniteError: training diverged.
    """
    name = type(method).__name__
    if method.needs_data and data is None:
        raise InputError(f"{name} learns from data and got none: pass data, e.g. --data digits")
    if not method.needs_data and data is not None:
        raise InputError(f"{name} is data-free and would ignore the data: leave it out")
    if data is not None:
        check_data(name, teacher, data)
    run: Any = getattr(method, "run", None)
    if run is not None:
        # A method of several stages trains each of them itself.
        student: Generator = run(teacher, data, out=out, budget=budget, **options)
        return student
    check: Any = getattr(method, "check", None)
    if check is not None:
        # What a method of one stage asks of its data, before there is a run folder.
        check(teacher, data)
    source = ConditionsOnly(teacher.conds) if data is None else data
    return train(teacher, method, source, out=out, budget=budget, **options)


def check_data(name: str, teacher: Generator, data: Data) -> None:
    """Refuses pictures that the teacher's network cannot take, and such without the labels that it reads.

    Raises:
        InputError: a shape that is not the teacher's, or no labels for a teacher with classes.
    """
    own, shape = tuple(teacher.denoiser.shape), getattr(data, "shape", None)
    if shape is not None and tuple(shape) != own:
        raise InputError(
            f"{name}: the data hold {tuple(shape)} and the teacher takes {own}: resize them, or encode them if it "
            "works on latents"
        )
    if isinstance(teacher.conds, Classes) and getattr(data, "classes", None) == 0:
        raise InputError(
            f"{name}: the teacher has {len(teacher.conds.frequencies)} classes and the data have no labels: its "
            "student would forget them; pass labelled data"
        )
