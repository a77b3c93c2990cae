MODEL = ""  # a file such as "edm-cifar10-32x32-cond-vp.pkl"; empty: a tiny random one

# From a pickle of NVIDIA's EDM to one step, as a folder that stock diffusers opens.
#
# The pickle's code is never run: names, settings and tensors are read, and the network is fewstep's own. SiD trains
# the student without data; the folder carries the network's code, because diffusers has no class for it.

from pathlib import Path

import torch
from edm_files import tiny_edm

import fewstep
from fewstep.core.role import Optim
from fewstep.distill import SiD, distill
from fewstep.report.pictures import save_grid

OUT = Path("runs/examples/edm-one-step")
BUDGET, BATCH = ("20M images", 256) if MODEL else ("10 steps", 4)

device = "cuda" if torch.cuda.is_available() else "cpu"
teacher = fewstep.load(MODEL or tiny_edm(OUT.parent / "tiny-edm.pkl"), device=device)
print(f"{teacher.card}: {teacher.sampler.nfe} evaluations by default")

method = SiD(student=Optim(lr=1e-5, betas=(0.0, 0.999)), fake=Optim(lr=1e-5, betas=(0.0, 0.999)))
student = distill(teacher, method, out=OUT, budget=BUDGET, batch=BATCH, device=device, overwrite=True)
save_grid(student.sample(16, seed=1, progress=False), OUT / "one.png")
folder = student.to_diffusers(OUT / "pipeline", overwrite=True)
print(f"{folder}: see its README.md")
