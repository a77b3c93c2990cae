MODEL = ""  # a folder or Hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5"; empty: a tiny random one

# From a Stable-Diffusion-like pipeline of 25 and more steps to five, without training.
#
# A handful of the model's own trajectories is followed to convergence under guidance, and a sampler of five evaluations
# is fitted to them. What comes out is a small JSON file, and a folder that stock diffusers opens.
#
# With a real model: put some hundred prompts like those that it is used for into PROMPTS (or the name of a text file
# with one per line), and SCALE at the guidance that it is used with, because a sampler fits one scale. The tiny model's
# pictures are noise; what can be compared is which of them are alike.

from dataclasses import replace
from pathlib import Path

import torch
from tiny_models import folder_of, stable_diffusion

import fewstep
from fewstep.core.state import write_text
from fewstep.export import TableauScheduler
from fewstep.report.pictures import save_strips

OUT = Path("runs/examples/sd-five-steps")
PROMPTS = ["a red fox", "a small harbour", "a bowl of plums"]
SHOWN = ["a red fox", "a small harbour", "a bowl of plums"]
SCALE = 7.5 if MODEL else 2.0
# Trajectories, pictures at a time, and the seconds after which the search for a better fit ends.
TRAJECTORIES, BATCH, SECONDS = (64, 8, 1800) if MODEL else (8, 16, 2)

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else None
teacher = fewstep.load(
    MODEL or folder_of(stable_diffusion(), OUT.parent / "tiny-sd"), device=device, dtype=dtype, prompts=PROMPTS
)
guided = fewstep.guided(teacher, SCALE)
print(f"{guided.sampler.name}: {guided.sampler.nfe} evaluations by default")

cond = guided.conditions(None, fewstep.Noise.of(0, TRAJECTORIES))
table = fewstep.calibrate(
    guided.denoiser, nfe=5, trajectories=TRAJECTORIES, cond=cond, batch=BATCH, budget=SECONDS, progress=True
)
facts = table.meta["calibration"]
print(f"error to the converged end: {facts['check_rmse_fitted']:.4f}, before fitting {facts['check_rmse_start']:.4f}")
write_text(OUT / "tableau.json", table.to_json())

strips = []
for name, sampler in (("own", guided.sampler), ("fitted", table)):
    pictures = guided.sample(cond=SHOWN, seed=1, sampler=sampler, batch=BATCH, progress=False)
    strips.append((f"{name}, {sampler.nfe}", pictures))
print(f"{save_strips(strips, OUT / 'compare.png')}: the same seeds by the pipeline's own sampler and by the new one")

# Either put it into a pipeline that is there already ...
#     pipe.scheduler = TableauScheduler.from_tableau(table, like=pipe.scheduler)
#     pipe(prompt, num_inference_steps=5, guidance_scale=SCALE)
scheduler = TableauScheduler.from_tableau(table, like=teacher.pipeline.scheduler_config)
print(f"the times of its five evaluations: {[round(t, 1) for t in scheduler.timesteps.tolist()]}")
# ... or write a folder for people who do not have fewstep; it is opened and compared before this returns.
made = replace(guided, sampler=table)
folder = made.to_diffusers(OUT / "pipeline", prompts=SHOWN[:2], overwrite=True, title="Five steps by a fitted sampler")
print(f"{folder}: see its README.md")
