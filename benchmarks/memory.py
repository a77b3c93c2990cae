"""What a run is told to need of memory, against the pages that a process really takes.

    python benchmarks/memory.py

SiD on a U-Net of 16x16 pictures, in a process of its own for each setting. The measure is the highest resident set of
two real steps less that before the networks were made, with an allocator that gives freed pages back. It shares nothing
with the estimate, which runs one step on tensors without contents.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BATCH = 48
SETTINGS: dict[str, dict[str, Any]] = {
    "full copies": {},
    "full copies, 2 micro-batches": {"micro": 2},
    "full copies, checkpointing": {"checkpointing": True},
    "LoRA of rank 16": {"lora": 16},
    "LoRA of rank 16, 2 micro-batches": {"lora": 16, "micro": 2},
    "LoRA of rank 16, checkpointing": {"lora": 16, "checkpointing": True},
    "full copies, bfloat16": {"bf16": True},
}
RESULT = Path(__file__).parent / "results" / "memory.json"


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def teacher(channels: int, blocks: int) -> Any:
    """A U-Net with fresh weights, as a generator of 3x16x16 pictures."""
    import torch

    from fewstep import edm
    from fewstep.core.generator import Generator
    from fewstep.grid.karras import karras
    from fewstep.models import UNet, UNetConfig
    from fewstep.solve.heun import heun

    torch.manual_seed(0)
    net = UNet(UNetConfig((3, 16, 16), 0, channels, (1, 2), blocks, (8,)))
    return Generator(edm(net, (3, 16, 16)), heun(karras(4, 0.002, 80)))


def one(setting: dict[str, Any], how: str) -> int:
    """Bytes of one setting, "measured" or "estimated"."""
    import contextlib

    from fewstep.core.fit import _Loop, build_models
    from fewstep.core.options import FitOptions
    from fewstep.data.conditions import ConditionsOnly
    from fewstep.distill import SiD
    from fewstep.models.checkpointing import checkpointed
    from fewstep.models.lora import LoRA
    from fewstep.train.memory import estimate_memory
    from fewstep.train.roles import roles_of

    options = {k: v for k, v in setting.items() if k != "lora"}
    lora = LoRA(setting["lora"]) if "lora" in setting else None
    method = SiD()

    def steps(channels: int, blocks: int, batch: int) -> None:
        chosen = FitOptions(batch=batch, **options)
        models = build_models(roles_of(method, teacher(channels, blocks), lora), "cpu")
        loop = _Loop(method, models, ConditionsOnly(None), chosen, None)
        around = checkpointed(models.networks.values()) if chosen.checkpointing else contextlib.nullcontext()
        with around:
            for i in range(2):
                loop.step(i, 0.0, loop.load(i))

    if how == "estimated":
        return estimate_memory(method, teacher(96, 2), None, FitOptions(batch=BATCH, **options), lora=lora).total
    # Libraries load and threads start on a small network, so that the baseline has them.
    steps(8, 1, 2)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    steps(96, 2, BATCH)
    return resident("VmHWM") - before


def main() -> None:
    """Measures every setting, or one in this process when named."""
    if len(sys.argv) == 3:
        print(one(SETTINGS[sys.argv[1]], sys.argv[2]))
        return
    rows = []
    # Freed blocks above 64 KiB go back to the system at once, so that the resident set is what is alive.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    for name in SETTINGS:
        found = {
            how: int(
                subprocess.run([sys.executable, __file__, name, how], env=env, check=True, capture_output=True).stdout
            )
            for how in ("estimated", "measured")
        }
        ratio = found["estimated"] / found["measured"]
        rows.append({"setting": name, **found, "ratio": round(ratio, 4)})
        print(
            f"{name:36} {found['estimated'] / 2**20:8.0f} MiB  {found['measured'] / 2**20:8.0f} MiB  {ratio:.3f}",
            flush=True,
        )
    RESULT.write_text(
        json.dumps({"command": "python benchmarks/memory.py", "batch": BATCH, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
