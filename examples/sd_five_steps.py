MODEL = ""  # a folder or Hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5"; empty: a tiny random one

# From a Stable-Diffusion-like pipeline of 25 and more steps to five, without training.
#
# A handful of the model's own trajectories is followed to convergence under guidance, and a sampler of five evaluations
# is fitted to them. What comes out is a small JSON file, and a folder that stock diffusers opens.

from dataclasses import replace
from pathlib import Path

import torch
from tiny_models import folder_of, stable_diffusion

import fewstep
from fewstep.export import TableauScheduler
from fewstep.report.pictures import save_grid

OUT = Path("runs/examples/sd-five-steps")
PROMPTS = ["a photograph of a red fox in the snow", "a watercolour of a harbour at dawn", "a bowl of plums"]
# With a real model: some hundred prompts like those that it is used for, and 64 trajectories or more.
TRAJECTORIES = 64 if MODEL else 12

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else None
source = MODEL or folder_of(stable_diffusion())

teacher = fewstep.load(source, device=device, dtype=dtype, prompts=PROMPTS)
guided = fewstep.guided(teacher, 7.5 if MODEL else 2.0)
print(f"{guided.sampler.name}: {guided.sampler.nfe} evaluations by default")

noise = fewstep.Noise.of(0, TRAJECTORIES * 2)
table = fewstep.calibrate(
    guided.denoiser, nfe=5, trajectories=TRAJECTORIES, cond=guided.conditions(None, noise), batch=8, progress=True
)
facts = table.meta["calibration"]
print(f"error to the converged end: {facts['check_rmse_fitted']:.4f}, before fitting {facts['check_rmse_start']:.4f}")

OUT.mkdir(parents=True, exist_ok=True)
(OUT / "tableau.json").write_text(table.to_json())
for name, sampler in (("own", guided.sampler), ("five", table)):
    save_grid(guided.sample(cond=PROMPTS, seed=1, sampler=sampler, progress=False), OUT / f"{name}.png")

# Either put it into a pipeline that is there already ...
#     pipe.scheduler = TableauScheduler.from_tableau(table, like=pipe.scheduler)
print(TableauScheduler.from_tableau(table, like=teacher.pipeline.scheduler_config).timesteps.tolist())
# ... or write a folder for people who do not have fewstep; it is opened and compared before this returns.
folder = replace(guided, sampler=table).to_diffusers(OUT / "pipeline", prompts=PROMPTS[:2], overwrite=True)
print(f"{folder}: see its README.md")
