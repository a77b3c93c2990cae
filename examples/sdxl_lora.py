MODEL = ""  # a folder or Hub id such as "stabilityai/stable-diffusion-xl-base-1.0"; empty: a tiny random one

# From an SDXL-like pipeline to a LoRA of four steps.
#
# SFD follows the teacher's own trajectories (no pictures are needed, only prompts) and teaches a student to take each
# of four large steps at once. Teacher and student are one backbone in memory: the student is a LoRA on it.

from pathlib import Path

import torch
from tiny_models import folder_of, sdxl

import fewstep
from fewstep.distill import SFD, distill
from fewstep.models.lora import LoRA
from fewstep.report.pictures import save_grid
from fewstep.train.memory import estimate_memory
from fewstep.train.run import options_of

OUT = Path("runs/examples/sdxl-lora")
PROMPTS = ["a photograph of a red fox in the snow", "a watercolour of a harbour at dawn", "a bowl of plums"]
BUDGET, BATCH, RANK = ("2000 steps", 16, 64) if MODEL else ("6 steps", 2, 4)

device = "cuda" if torch.cuda.is_available() else "cpu"
source = MODEL or folder_of(sdxl())
teacher = fewstep.load(source, device=device, dtype=torch.bfloat16 if MODEL else None, prompts=PROMPTS)
# SDXL knows no level below 0.03.
method, lora = SFD(steps=4, sigma_min=0.03), LoRA(rank=RANK)

# What it will need, before anything starts; `fewstep distill sfd --dry-run` prints the same.
settings = {"batch": BATCH, "checkpointing": bool(MODEL), "bf16": bool(MODEL), "device": device}
print(estimate_memory(method, teacher, None, options_of(BUDGET, settings), lora=lora).table())

student = distill(teacher, method, out=OUT, budget=BUDGET, lora=lora, overwrite=True, log_every=2, **settings)
save_grid(student.sample(cond=PROMPTS, seed=1, progress=False), OUT / "four.png")
print(f"{OUT}/lora: for pipe.load_lora_weights; the merged student is {OUT}")

folder = student.to_diffusers(OUT / "pipeline", prompts=PROMPTS[:2], overwrite=True)
print(f"{folder}: see its README.md")
