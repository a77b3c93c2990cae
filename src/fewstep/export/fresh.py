"""Runs in a process of its own, where fewstep cannot be imported: opens an exported pipeline as any user would.

``python -I fresh.py request.json`` reads what to run, and writes the pictures, every random draw that made them, the
grid that the scheduler chose and what the model card's snippet drew. It needs torch and diffusers alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.modules["fewstep"] = None  # type: ignore[assignment]  # any import of it fails from here on

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402


class Draws(TorchFunctionMode):
    """Keeps every normal draw in order, so that another sampler can be given the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        out = func(*args, **(kwargs or {}))
        if func in (torch.randn, torch.randn_like):
            self.kept.append(out.detach().cpu().clone())
        return out


class Inputs:
    """Keeps the times that the network was asked about."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.times: list[float] = []
        module.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """A hook on the network's forward."""
        found = next((kwargs[k] for k in ("timestep", "timesteps", "sigma") if k in kwargs), None)
        found = args[1] if found is None and len(args) > 1 else found
        if found is not None:
            self.times.append(float(torch.as_tensor(found, dtype=torch.float64).reshape(-1)[0]))


def opened(request: dict[str, Any]) -> Any:
    """The pipeline, as the model card says to open it."""
    from diffusers import DiffusionPipeline

    options = {**request["options"], **({"trust_remote_code": True} if request["remote_code"] else {})}
    pipe = DiffusionPipeline.from_pretrained(
        request["folder"], torch_dtype=torch.float32, local_files_only=True, **options
    )
    if request["lora"] is not None:
        adapted(pipe, **request["lora"])
    if getattr(pipe, "safety_checker", None) is not None:
        # It blackens pictures that it dislikes, and what is compared is what the network makes.
        pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(request["device"])


def adapted(pipe: Any, folder: str, scheduler: str) -> None:
    """Puts the LoRA and the scheduler of a repository into its base pipeline."""
    import diffusers
    from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

    pipe.load_lora_weights(folder)
    kind = getattr(diffusers, scheduler, None)
    if kind is None:
        kind = get_class_from_dynamic_module(
            folder, "scheduling_fewstep.py", subfolder="scheduler", class_name=scheduler, trust_remote_code=True
        )
    pipe.scheduler = kind.from_pretrained(folder, subfolder="scheduler")


def pictures_of(pipe: Any, request: dict[str, Any]) -> torch.Tensor:
    """(B, C, H, W) in [0, 1]."""
    torch.manual_seed(request["seed"])
    generator = torch.Generator("cpu").manual_seed(request["seed"])
    made = pipe(**request["call"], generator=generator, output_type="np").images
    return torch.as_tensor(made).float().permute(0, 3, 1, 2).contiguous()


def main(place: str) -> None:
    """Runs a request."""
    request = json.loads(Path(place).read_text())
    out = Path(request["out"])
    # Products of few digits would hide, or show, differences that are none.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    pipe = opened(request)
    seen = Inputs(getattr(pipe, request["network"]))
    with Draws() as draws:
        pictures = pictures_of(pipe, request)
    tensors = {"pictures": pictures, **{f"draw.{i:04d}": d.contiguous().clone() for i, d in enumerate(draws.kept)}}
    save_file(tensors, out / "pictures.safetensors")
    times = [float(t) for t in pipe.scheduler.timesteps]
    facts = {"class": type(pipe.scheduler).__name__, "timesteps": times, "asked": seen.times}
    if request.get("snippet"):
        scope: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(request["snippet"], "README.md", "exec"), scope)
        scope["image"].save(out / "snippet.png")
    (out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
