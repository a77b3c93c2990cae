"""Pipelines that fewstep has exported, opened again: the sampler that they carry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.core.state import read_json
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError

OWN = "TableauScheduler"
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def carried(config: Mapping[str, Any]) -> tuple[dict[str, Any], Tableau | None]:
    """A scheduler's configuration and None; for fewstep's own, that of a stock one for the same model, and the table.

    Nothing but numbers is read: the code that such a folder carries is not run.

    Raises:
        InputError: a configuration of fewstep's own scheduler that is damaged, or of a pixel model with its own code.
    """
    if config.get("_class_name") != OWN:
        return dict(config), None
    path = config.get("path")
    if path not in ("vp", "flow"):
        raise InputError(f"a {OWN} with path={path!r} belongs to a network that is no class of diffusers")
    try:
        sigmas = [math.nan if s is None else float(s) for s in config["sigmas"]]
        tables = {key: torch.tensor(config[key], dtype=torch.float64) for key in ("levels", "P", "W", "Z")}
        std = config.get("start_std")
        meta = {} if std is None else {"traced": {"start_std": float(std)}}
        table = Tableau(torch.tensor(sigmas, dtype=torch.float64), **tables, name=str(config["name"]), meta=meta)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the configuration of a {OWN} lacks or garbles {error}") from None
    if path == "flow":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler"}, table
    same = {k: config[k] for k in _BETAS if config.get(k) is not None}
    return {"_class_name": "DDIMScheduler", **same, "prediction_type": config.get("prediction_type")}, table


def exported_steps(root: Path) -> int | None:
    """The number of steps that an exported pipeline is made for; None for a folder that fewstep did not export."""
    place = root / "fewstep.json"
    if not place.is_file():
        return None
    found = read_json(place).get("num_inference_steps")
    return found if isinstance(found, int) else None
