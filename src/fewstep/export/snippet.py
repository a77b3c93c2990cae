"""The few lines of a model card that people copy, and the proof that they run where fewstep is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.core.state import write_bytes
from fewstep.errors import InputError, unknown

DTYPES = ("float32", "float16", "bfloat16")
PICTURE = "picture.png"
CODE = "scheduling_fewstep"
# What a process may not see: it runs code, and needs no rights for it.
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

BOOT = """
import runpy, sys
if {blocked!r}:
    sys.modules["fewstep"] = None
found = runpy.run_path("snippet.py", run_name="__main__")
if "image" not in found:
    raise SystemExit("the snippet leaves no variable named image")
found["image"].save({picture!r})
"""


def snippet_for(
    pipeline: str,
    source: str,
    call: Mapping[str, Any],
    *,
    remote_code: bool = False,
    seed: int = 0,
    dtype: str | None = None,
    base: str | None = None,
    scheduler: str | None = None,
) -> str:
    """Python that leaves one picture in ``image`` with torch and diffusers alone.

    Args:
        pipeline: class of diffusers that opens it; one that comes with the repository is opened as DiffusionPipeline.
        source: the repository, as owner/name, or a folder.
        call: keyword arguments of the pipeline, such as ``{"prompt": "a fox", "num_inference_steps": 4}``.
        remote_code: whether the repository brings code of its own, which the reader must agree to run.
        seed: of the generator, on the CPU, so that every device draws the same noise.
        dtype: "float32", "float16" or "bfloat16"; None leaves it to the library.
        base: of a LoRA: the model that ``source`` is loaded into, with the scheduler in ``source``'s own folder.
        scheduler: of a LoRA: the class of its scheduler; "TableauScheduler" is loaded with its code.

    Raises:
        InputError: an unknown dtype, a LoRA without its scheduler, or arguments that are not plain Python values.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if (base is None) != (scheduler is None):
        raise InputError("a LoRA's snippet needs base and scheduler: a LoRA file cannot carry its own sampler")
    for name, value in call.items():
        if not isinstance(value, str | int | float | bool | list | tuple | None):
            raise InputError(f"argument {name!r} of a snippet must be a plain value, got a {type(value).__name__}")
    opened = pipeline if pipeline.endswith("Pipeline") and not remote_code else "DiffusionPipeline"
    names = [opened] + ([scheduler] if scheduler not in (None, "TableauScheduler") else [])
    lines = ["import torch", f"from diffusers import {', '.join(sorted(map(str, names)))}"]
    if scheduler == "TableauScheduler":
        lines.append("from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module")
    options = [] if dtype is None else [f"torch_dtype=torch.{dtype}"]
    trusted = ["trust_remote_code=True"] if remote_code and base is None else []
    loaded = ", ".join([_text(base or source), *options, *trusted])
    lines += ["", 'device = "cuda" if torch.cuda.is_available() else "cpu"']
    lines.append(f"pipe = {opened}.from_pretrained({loaded})")
    if base is not None:
        lines += _lora_lines(source, str(scheduler))
    arguments = [f"{name}={_text(value)}" for name, value in call.items()] + ["generator=generator"]
    one_line = f"image = pipe({', '.join(arguments)}).images[0]"
    several = ["image = pipe(", *(f"    {a}," for a in arguments), ").images[0]"]
    lines += ["pipe.to(device)", f'generator = torch.Generator("cpu").manual_seed({int(seed)})']
    return "\n".join([*lines, *([one_line] if len(one_line) <= 100 else several)]) + "\n"


def _lora_lines(source: str, scheduler: str) -> list[str]:
    place = _text(source)
    lines = [f"pipe.load_lora_weights({place})"]
    if scheduler == "TableauScheduler":
        found = f'{place}, "{CODE}.py", subfolder="scheduler", class_name="{scheduler}", trust_remote_code=True'
        lines.append(f"{scheduler} = get_class_from_dynamic_module(\n    {found}\n)")
    return [*lines, f'pipe.scheduler = {scheduler}.from_pretrained({place}, subfolder="scheduler")']


def _text(value: Any) -> str:
    """A value as Python text, strings in double quotes."""
    if not isinstance(value, str):
        return repr(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def fewstep_snippet(source: str, *, seed: int = 0) -> str:
    """Python that opens a fewstep folder with fewstep, for repositories that stock diffusers cannot open."""
    return (
        "import fewstep\n"
        "from fewstep.report.pictures import grid_image\n\n"
        f"generator = fewstep.load({_text(source)})\n"
        f"image = grid_image(generator.sample(4, seed={int(seed)}))\n"
    )


def run_snippet(
    text: str,
    folder: str | Path,
    *,
    repo: str | None = None,
    others: Mapping[str, str | Path] | None = None,
    timeout: float = 900.0,
    with_fewstep: bool = False,
    out: str | Path | None = None,
) -> Path:
    """Executes a card's snippet in a fresh process and returns the picture that it left in ``image``.

    There ``import fewstep`` fails, unless ``with_fewstep``; the Hub is offline and no token is known. The text runs as
    it stands: with ``repo`` it calls the folder by that name, owner/name, which the process finds beside itself; so
    with ``others``, names and folders of further models such as a LoRA's base. ``out`` is where the picture goes,
    ``folder/picture.png`` by default.

    Raises:
        InputError: no such folder, or the process failed, took more than ``timeout`` seconds or left no picture; the
            message holds its last lines.
    """
    folder = Path(folder).resolve()
    places = {**({} if repo is None else {repo: folder}), **{k: Path(v).resolve() for k, v in (others or {}).items()}}
    for place in (folder, *places.values()):
        if not place.is_dir():
            raise InputError(f"{place} is no folder: a snippet is run on an exported model")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for called, place in places.items():
            (work / called).parent.mkdir(parents=True, exist_ok=True)
            (work / called).symlink_to(place, target_is_directory=True)
        (work / "snippet.py").write_text(text)
        boot = BOOT.format(blocked=not with_fewstep, picture=PICTURE)
        environment = {k: v for k, v in os.environ.items() if k not in SECRETS}
        # Code that a folder brings is copied before it runs: not to where other folders' code of this name lies.
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules"), "TQDM_DISABLE": "1"}
        environment["HF_TOKEN_PATH"] = str(work / "no-token")
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", boot],
                cwd=work,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise InputError(
                f"the snippet for {folder} did not finish within {timeout:g} s: use fewer steps or pass timeout="
            ) from None
        if done.returncode or not (work / PICTURE).is_file():
            last = " | ".join(line.strip() for line in done.stderr.strip().splitlines()[-3:])
            raise InputError(f"the snippet for {folder} does not run in a fresh process: {last}")
        made = folder / PICTURE if out is None else Path(out)
        write_bytes(made, (work / PICTURE).read_bytes())
    return made
