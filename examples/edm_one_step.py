MODEL = ""  # a file such as "edm-cifar10-32x32-cond-vp.pkl"; empty: a tiny random one

# From a pickle of NVIDIA's EDM to one step, as a folder that stock diffusers opens.
#
# The pickle's code is never run: names, settings and tensors are read, and the network is fewstep's own. SiD trains
# the student without data; the folder carries the network's code, because diffusers has no class for it.
#
# With a real model: learning rate, betas and alpha below are the paper's for CIFAR-10 (arXiv 2404.04057), which trained
# on some 500 million generated pictures; a tenth of that shows whether it works. `fewstep distill sid --teacher FILE
# --batch 256 --dry-run` says whether it fits into memory, docs/memory.md how to make it fit.

from pathlib import Path

import torch
from edm_files import tiny_edm

import fewstep
from fewstep.core.role import Optim
from fewstep.distill import SiD, distill
from fewstep.report.pictures import save_strips

OUT = Path("runs/examples/edm-one-step")
BUDGET, BATCH = ("50M images", 256) if MODEL else ("10 steps", 4)

device = "cuda" if torch.cuda.is_available() else "cpu"
teacher = fewstep.load(MODEL or tiny_edm(OUT.parent / "tiny-edm.pkl"), device=device)
print(f"{teacher.card['source']} ({teacher.card['class']}): {teacher.sampler.nfe} evaluations by default")

optim = Optim(lr=1e-5, betas=(0.0, 0.999))
method = SiD(alpha=1.2, student=optim, fake=optim)
student = distill(teacher, method, out=OUT, budget=BUDGET, batch=BATCH, device=device, overwrite=True)

strips = []
for name, made in (("teacher", teacher), ("student", student)):
    strips.append((f"{name}, {made.sampler.nfe}", made.sample(8, seed=1, progress=False)))
print(f"{save_strips(strips, OUT / 'compare.png')}: the same seeds by teacher and student")

folder = student.to_diffusers(OUT / "pipeline", overwrite=True, title="One step by SiD")
print(f"{folder}: see its README.md")
