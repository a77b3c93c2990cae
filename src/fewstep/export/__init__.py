"""Students out: schedulers, pipelines, LoRA files and model cards that work where fewstep is not installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fewstep.core.generator import EXPORTERS

# By name only, because most of these import diffusers, which takes seconds and may be absent.
_HOMES = {
    "TableauScheduler": "scheduler",
    "apply_lora": "lora",
    "export_lora": "lora_repo",
    "model_card": "card",
    "push_sampler": "hub",
    "push_to_hub": "hub",
    "save_lora": "lora",
    "strip_lora": "lora",
    "save_scheduler": "scheduler",
    "scheduler_code": "scheduler",
    "Plain": "sigmas",
    "as_text": "sigmas",
    "plain_sampler": "sigmas",
    "sigma_list": "sigmas",
    "stock_scheduler": "stock",
    "to_diffusers": "pipeline",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def _late(name: str) -> Any:
    """A function of this room that is imported when it is called."""

    def run(*args: Any, **options: Any) -> Any:
        return __getattr__(name)(*args, **options)

    return run


EXPORTERS.update(diffusers=_late("to_diffusers"), hub=_late("push_to_hub"))
