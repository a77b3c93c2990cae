MODEL = ""  # a folder or Hub id such as "stabilityai/stable-diffusion-xl-base-1.0"; empty: a tiny random one

# From an SDXL-like pipeline to a LoRA of four steps.
#
# SFD follows the teacher's own trajectories (no pictures are needed, only prompts) and teaches a student to take each
# of four large steps at once. Teacher and student are one backbone in memory: the student is a LoRA on it.
#
# With a real model: thousands of prompts in PROMPTS (or the name of a text file with one per line), because the student
# sees nothing else. What is followed is the model without guidance; use the student at a low guidance scale, and judge
# it by its pictures before you train for long.

from pathlib import Path

import torch
from rich.console import Console
from tiny_models import folder_of, sdxl

import fewstep
from fewstep.distill import SFD, distill
from fewstep.export import export_lora
from fewstep.models.lora import LoRA
from fewstep.report.pictures import save_strips
from fewstep.train.memory import estimate_memory
from fewstep.train.run import options_of

OUT = Path("runs/examples/sdxl-lora")
PROMPTS = ["a red fox", "a small harbour", "a bowl of plums"]
SHOWN = ["a red fox", "a small harbour", "a bowl of plums"]
BUDGET, BATCH, MICRO, RANK = ("2000 steps", 16, 4, 64) if MODEL else ("6 steps", 2, 1, 4)

device = "cuda" if torch.cuda.is_available() else "cpu"
teacher = fewstep.load(
    MODEL or folder_of(sdxl(), OUT.parent / "tiny-sdxl"),
    device=device,
    dtype=torch.bfloat16 if MODEL else None,
    prompts=PROMPTS,
)
method, lora = SFD(steps=4), LoRA(rank=RANK)
low, high = method.ends(teacher.denoiser)
print(f"SFD from sigma {high:.3g} to {low:.3g}, where this teacher's levels end")

# What it will need, before anything starts; `fewstep distill sfd --dry-run` prints the same.
settings = {"batch": BATCH, "micro": MICRO, "checkpointing": bool(MODEL), "bf16": bool(MODEL), "device": device}
Console().print(estimate_memory(method, teacher, None, options_of(BUDGET, settings), lora=lora).table())

student = distill(teacher, method, out=OUT, budget=BUDGET, lora=lora, overwrite=True, log_every=2, **settings)
print(f"{OUT}: the merged student, and its LoRA in {OUT}/lora")

strips = []
for name, made in (("teacher", teacher), ("student", student)):
    pictures = made.sample(cond=SHOWN, seed=1, batch=BATCH, progress=False)
    strips.append((f"{name}, {made.sampler.nfe}", pictures))
print(f"{save_strips(strips, OUT / 'compare.png')}: the same seeds by teacher and student")

# For the Hub: LoRA, scheduler and a card. It is put on the base in a process without fewstep, and compared, before this
# returns. `student.to_diffusers(folder)` writes the merged student as a whole pipeline instead.
folder = export_lora(OUT, OUT / "repository", prompts=SHOWN[:2], overwrite=True, title="Four steps by SFD, a LoRA")
print(f"{folder}: see its README.md")
