MODEL = ""  # a folder or Hub id such as "black-forest-labs/FLUX.1-dev"; empty: a tiny random one

# From a Flux-like flow model, which is told its guidance, to six steps without training.
#
# Pure noise of a flow model is the level 1e8: the fitted sampler starts there, as the pipeline does.
#
# With a real model: some hundred prompts like those that it is used for in PROMPTS (or the name of a text file with one
# per line). A sampler belongs to the size of the pictures and to the guidance that it was fitted at: set SIZE and
# GUIDANCE to what the model is used with. FLUX.1-dev in bfloat16 with its text encoders takes some 34 GB; the encoders
# are let go before the fit, which leaves 24.

from pathlib import Path

import torch
from tiny_models import flux, folder_of

import fewstep
from fewstep.core.state import write_text
from fewstep.report.pictures import save_strips

OUT = Path("runs/examples/flux-few-steps")
PROMPTS = ["a red fox", "a small harbour", "a bowl of plums"]
SHOWN = ["a red fox", "a small harbour", "a bowl of plums"]
GUIDANCE, SIZE = 3.5, 1024 if MODEL else 16
# Trajectories, pictures at a time, and the seconds after which the search for a better fit ends.
TRAJECTORIES, BATCH, SECONDS = (24, 1, 3600) if MODEL else (8, 16, 2)

device = "cuda" if torch.cuda.is_available() else "cpu"
teacher = fewstep.load(
    MODEL or folder_of(flux(), OUT.parent / "tiny-flux"),
    device=device,
    dtype=torch.bfloat16 if MODEL else None,
    size=SIZE,
    steps=28,
    prompts=PROMPTS,
    embedded_guidance=GUIDANCE,
)
cond, shown = teacher.conditions(None, fewstep.Noise.of(0, TRAJECTORIES)), teacher.encode(SHOWN)
teacher.pipeline.release()
table = fewstep.calibrate(
    teacher.denoiser, nfe=6, trajectories=TRAJECTORIES, cond=cond, batch=BATCH, budget=SECONDS, progress=True
)
facts = table.meta["calibration"]
print(f"error to the converged end: {facts['check_rmse_fitted']:.4f}, before fitting {facts['check_rmse_start']:.4f}")
write_text(OUT / "tableau.json", table.to_json())

strips = []
for name, sampler in (("own", teacher.sampler), ("fitted", table)):
    pictures = teacher.sample(cond=shown, seed=1, sampler=sampler, batch=BATCH, progress=False)
    strips.append((f"{name}, {sampler.nfe}", pictures))
print(f"{save_strips(strips, OUT / 'compare.png')}: the same seeds by the pipeline's own sampler and by the new one")

made = teacher.with_sampler(table)
folder = made.to_diffusers(OUT / "pipeline", prompts=SHOWN[:2], overwrite=True, title="Six steps by a fitted sampler")
print(f"{folder}: see its README.md")
