"""From a table to a scheduler of diffusers: :class:`TableauScheduler`, and the folder that a pipeline ships it in."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.core.generator import Generator
from fewstep.core.state import write_text
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError

try:
    from fewstep.export import scheduling_fewstep as alone
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] != "diffusers":
        raise
    raise InputError("diffusers is not installed: pip install 'fewstep[hf]'") from None

CODE = "scheduling_fewstep"
# These tell the network another time or show it a rescaled input, so that its output means something else.
OTHER_STATES = ("EDM", "CosineDPM", "CMStochastic", "IPNDM")


class TableauScheduler(alone.TableauScheduler):
    """``fewstep.export.scheduling_fewstep.TableauScheduler`` with the way to make one from a table."""

    @classmethod
    def from_tableau(
        cls,
        tableau: Any,
        like: Any = None,
        prediction_type: str | None = None,
        *,
        path: str | None = None,
        start_std: float | None = None,
        model_timesteps: Sequence[float] | None = None,
    ) -> TableauScheduler:
        """The scheduler of a table, for the model of the stock scheduler that it replaces.

        ``tableau`` is a :class:`~fewstep.core.tableau.Tableau`, or anything with its ``sigmas``, ``levels``, ``P``,
        ``W``, ``Z`` and ``meta``. ``like`` is the pipeline's scheduler or its config: betas or flow, and what the
        network predicts, come from there. A traced table brings its own. ``path="edm"`` needs neither: the network is
        then told sigma and shown ``x0 + sigma n``. ``start_std`` is the standard deviation of the start in
        ``x0 + sigma n``, by default the one that was traced, or the level of the start. ``model_timesteps`` replace
        the times that the network is told, one for each of its calls.

        Raises:
            InputError: neither ``like`` nor a path is known, a scheduler whose network means something else, weights
                that do not fit together, or levels outside of the model's range.
        """
        traced = dict(getattr(tableau, "meta", None) or {}).get("traced", {})
        if like is None and path is None and "scheduler" in traced:
            like = {**traced["config"], "_class_name": traced["scheduler"]}
        if like is None and path is None:
            raise InputError("which model is the table for? pass like=pipe.scheduler, or path='edm' for x0 + sigma n")
        fields = ({} if like is None else model_of(like)) | ({} if path is None else {"path": path})
        known = alone.PREDICTIONS.get(fields["path"], ("epsilon",))
        fields["prediction_type"] = prediction_type or fields.get("prediction_type") or known[0]
        levels = [float(x) for x in tableau.levels]
        try:
            made = cls(
                sigmas=[None if math.isnan(s) else float(s) for s in tableau.sigmas],
                levels=levels,
                **{key: [[float(w) for w in row] for row in getattr(tableau, key)] for key in ("P", "W", "Z")},
                start_std=start_of(tableau) if start_std is None else float(start_std),
                model_timesteps=None if model_timesteps is None else [float(t) for t in model_timesteps],
                use_flow_sigmas=fields["path"] == "flow",
                name=str(getattr(tableau, "name", "tableau")),
                **fields,
            )
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error)) from None
        if fields["path"] == "flow" and abs(made.init_noise_sigma - 1) > 1e-3:
            warnings.warn(
                f"{made.config['name']} starts at {made.init_noise_sigma:.4g} times unit noise, but pipelines of flow "
                "models start at unit noise whatever the scheduler says: make the table from pure noise, level 1e8",
                stacklevel=2,
            )
        return made


def start_of(tableau: Any) -> float | None:
    """The traced standard deviation of the start in ``x0 + sigma n``; None where it is the level itself.

    A cut table keeps the facts of the whole, so that what was traced counts only if it fits the level of the start.
    """
    std = dict(getattr(tableau, "meta", None) or {}).get("traced", {}).get("start_std")
    level = float(tableau.levels[0])
    ours = std is not None and any(abs(std - s) <= 1e-3 * s for s in (level, math.hypot(1.0, level)))
    return float(std) if ours else None


def model_of(like: Any) -> dict[str, Any]:
    """The ``path``, ``prediction_type`` and, for a variance-preserving model, betas of a TableauScheduler.

    ``like`` is a stock scheduler or its config, with or without ``_class_name``.

    Raises:
        InputError: a scheduler that preconditions the network, or a config without betas that is no flow model's.
    """
    given = like if isinstance(like, Mapping) else getattr(like, "config", None)
    if not isinstance(given, Mapping):
        raise InputError(f"like must be a scheduler of diffusers or its config, got {type(like).__name__}")
    config = dict(given)
    name = str(config.get("_class_name", "this config")) if isinstance(like, Mapping) else type(like).__name__
    if name == "TableauScheduler":
        return {key: config[key] for key in ("path", "prediction_type", *alone.BETAS)}
    if name.startswith(OTHER_STATES):
        raise InputError(
            f"{name} preconditions the network itself, and its output is neither noise, v nor x0: a TableauScheduler "
            "needs a network that returns x0 from x0 + sigma n, with path='edm'"
        )
    kind = config.get("prediction_type")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") or kind == "flow_prediction":
        count = config.get("num_train_timesteps", 1000)
        return {"path": "flow", "prediction_type": "flow_prediction", "num_train_timesteps": count}
    fields = {key: config[key] for key in alone.BETAS if config.get(key) is not None}
    if not {"beta_start", "trained_betas"} & set(fields):
        raise InputError(f"{name} has no betas: pass like=pipe.scheduler, or the whole scheduler_config.json")
    if "trained_betas" in fields:
        fields["trained_betas"] = [float(b) for b in fields["trained_betas"]]
        fields["num_train_timesteps"] = len(fields["trained_betas"])
    return {"path": "vp", "prediction_type": kind or "epsilon", **fields}


def scheduler_code() -> str:
    """The text of the scheduler's own file, which a pipeline folder carries as ``scheduler/scheduling_fewstep.py``."""
    return Path(alone.__file__).read_text()


def save_scheduler(sampler: Tableau | Generator | alone.TableauScheduler, folder: str | Path, **options: Any) -> Path:
    """Writes ``scheduler_config.json`` and ``scheduling_fewstep.py``: what a pipeline's ``scheduler/`` folder needs.

    ``sampler`` is a scheduler, or a table or a generator with one, for which ``options`` go to
    :meth:`TableauScheduler.from_tableau`; a generator's starts from the noise that the generator itself starts from.
    In the pipeline's ``model_index.json`` the entry is
    ``"scheduler": ["scheduling_fewstep", "TableauScheduler"]``, and it is loaded with ``trust_remote_code=True``.

    Raises:
        InputError: a sampler that is no table, what from_tableau raises, or a place that cannot be written.
    """
    made = sampler.sampler if isinstance(sampler, Generator) else sampler
    if isinstance(made, Tableau):
        if isinstance(sampler, Generator):
            options.setdefault("start_std", sampler.start_std())
        made = TableauScheduler.from_tableau(made, **options)
    if not isinstance(made, alone.TableauScheduler):
        raise InputError(
            f"a {type(made).__name__} is no table, and a scheduler of diffusers cannot run it: export a sampler whose "
            "weights do not depend on the state"
        )
    folder = Path(folder)
    write_text(folder / f"{CODE}.py", scheduler_code())
    write_text(folder / made.config_name, made.to_json_string())
    return folder
