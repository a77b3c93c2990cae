MODEL = ""  # a folder or Hub id such as "black-forest-labs/FLUX.1-dev"; empty: a tiny random one

# From a Flux-like flow model, which is told its guidance, to six steps without training.
#
# Pure noise of a flow model is the level 1e8: the fitted sampler starts there, as the pipeline does.

from pathlib import Path

import torch
from tiny_models import flux, folder_of

import fewstep
from fewstep.report.pictures import save_grid

OUT = Path("runs/examples/flux-few-steps")
PROMPTS = ["a photograph of a red fox in the snow", "a watercolour of a harbour at dawn", "a bowl of plums"]
TRAJECTORIES = 32 if MODEL else 12

device = "cuda" if torch.cuda.is_available() else "cpu"
source = MODEL or folder_of(flux())
size = 1024 if MODEL else None
teacher = fewstep.load(
    source,
    device=device,
    dtype=torch.bfloat16 if MODEL else None,
    size=size,
    steps=28,
    prompts=PROMPTS,
    embedded_guidance=3.5,
)
cond = teacher.conditions(None, fewstep.Noise.of(0, TRAJECTORIES))
table = fewstep.calibrate(teacher.denoiser, nfe=6, trajectories=TRAJECTORIES, cond=cond, batch=2, progress=True)
facts = table.meta["calibration"]
print(f"error to the converged end: {facts['check_rmse_fitted']:.4f}, before fitting {facts['check_rmse_start']:.4f}")

OUT.mkdir(parents=True, exist_ok=True)
for name, sampler in (("own", teacher.sampler), ("six", table)):
    save_grid(teacher.sample(cond=PROMPTS, seed=1, sampler=sampler, progress=False), OUT / f"{name}.png")
folder = teacher.with_sampler(table).to_diffusers(OUT / "pipeline", prompts=PROMPTS[:2], overwrite=True)
print(f"{folder}: see its README.md")
