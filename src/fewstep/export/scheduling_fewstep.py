"""A sampler table as a scheduler of diffusers: one file that needs diffusers and torch alone.

It is copied into exported pipelines, so it imports nothing else. A table is
``y[k+1] = sum_j P[k,j] y[k-j] + sum_j W[k,j] D[k-j] + sum_j Z[k,j] eps[k-j]`` on points ``x = x0 + sigma n``, with
``D[k]`` the model's x0 at ``(y[k], sigmas[k])`` and unit noises ``eps``. The pipeline holds ``x_u = a x0 + b n`` with
``b / a = sigma``, as with the stock schedulers.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

PURE_NOISE = 1e8
PREDICTIONS = {
    "vp": ("epsilon", "v_prediction", "sample"),
    "flow": ("flow_prediction", "epsilon", "sample"),
    "edm": ("sample", "epsilon"),
}
COMPATIBLES = [*[e.name for e in KarrasDiffusionSchedulers], "FlowMatchEulerDiscreteScheduler"]
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


class TableauScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Runs a fixed table of weights in a stock pipeline. Made by ``fewstep.export``.

    The number of steps is the table's number of model calls and cannot be changed, nor can its grid.

    Args:
        sigmas: (K,) level at which row k calls the model; None where it makes no call.
        levels: (K+1,) level of each point.
        P: (K, H) weights of the points.
        W: (K, H) weights of the model's x0.
        Z: (K, H) weights of the unit noises.
        path: "vp" (``a^2 + b^2 = 1``, a table of betas), "flow" (``a = 1 - t, b = t``) or "edm" (``a = 1``).
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
        start_std: standard deviation of the start in ``x0 + sigma n``; by default ``levels[0]``.
        model_timesteps: the time that the network is told at each call; by default it follows from the level.
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: as in the stock
            schedulers; the betas count for "vp" only.
        use_flow_sigmas: read by pipelines of flow models, which then leave the grid to the scheduler.
        name: what people call the table.

    Raises:
        ValueError: tables that do not fit together, or levels that the model does not have.
    """

    _compatibles = COMPATIBLES
    order = 1

    @register_to_config
    def __init__(
        self,
        sigmas: list | None = None,
        levels: list | None = None,
        P: list | None = None,
        W: list | None = None,
        Z: list | None = None,
        path: str = "vp",
        prediction_type: str = "epsilon",
        start_std: float | None = None,
        model_timesteps: list | None = None,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list | None = None,
        rescale_betas_zero_snr: bool = False,
        use_flow_sigmas: bool = False,
        name: str = "tableau",
    ) -> None:
        if sigmas is None or levels is None or P is None or W is None or Z is None:
            raise ValueError(
                "TableauScheduler needs a table: load a saved one, or use fewstep.export.TableauScheduler.from_tableau"
            )
        if path not in PREDICTIONS or prediction_type not in PREDICTIONS[path]:
            raise ValueError(f"path {path!r} with prediction_type {prediction_type!r}: expected one of {PREDICTIONS}")
        self._path, self._kind, self._name = path, prediction_type, name
        self._count = int(num_train_timesteps)
        self._calls = [k for k, s in enumerate(sigmas) if s is not None]
        self._called = [float(sigmas[k]) for k in self._calls]
        self._levels = [float(level) for level in levels]
        if not self._calls or len(levels) != len(sigmas) + 1 or any(len(t) != len(sigmas) for t in (P, W, Z)):
            raise ValueError(
                f"a table of {len(sigmas)} rows needs a model call, one level more and as many rows of P, W and Z, got "
                f"{len(self._calls)} calls, {len(levels)} levels, and {len(P)}, {len(W)} and {len(Z)} rows"
            )
        self._rows = [tuple(_terms(t[k], k) for t in (P, W, Z)) for k in range(len(sigmas))]
        used = [[i for row in self._rows for i, _ in row[part]] for part in range(3)]
        if min(sum(used, [0])) < 0 or set(used[1]) - set(self._calls):
            raise ValueError(
                "the table weighs something from before its start, or outputs of rows without a model call"
            )
        self._drawn = set(used[2])
        self._depth = max((k - i for k, row in enumerate(self._rows) for t in row for i, _ in t), default=0) + 1
        if prediction_type == "epsilon" and max(self._called) > 1e6:
            raise ValueError(
                f"at level {max(self._called):g}, pure noise, a network that predicts noise says nothing about the "
                "picture: start at a lower level, or use a v_prediction or flow_prediction model"
            )
        self._times = self._model_times(model_timesteps)
        self._scales = [self._ab(s)[0] for s in self._called]
        self._gains = self._leading_gains()
        start = self._levels[0] if start_std is None else float(start_std)
        self.init_noise_sigma = start * self._gains[-1] * self._scales[0]
        self.num_inference_steps = len(self._calls)
        self.set_timesteps()

    def __len__(self) -> int:
        return self._count

    @property
    def step_index(self) -> int | None:
        """The number of the coming model call; None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The model call that the pipeline starts at, if it said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts at a later call. Rows that need something from before it become first-order steps."""
        if not 0 <= begin_index < len(self._calls):
            # Pipelines that start from a picture skip steps by their strength, and may skip all of a few.
            fix = f": with strength {1 / len(self._calls):.3g} or more a step is left" if begin_index > 0 else ""
            raise ValueError(f"begin_index must be in 0 .. {len(self._calls) - 1}, got {begin_index}{fix}")
        self._begin_index: int | None = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Forgets the last run. The table's own grid is the only one: arguments may repeat it. ``mu`` is ignored.

        Raises:
            ValueError: another number of steps, or other timesteps or sigmas than the table's.
        """
        count, flow, edm = len(self._calls), self._path == "flow", self._path == "edm"
        only = f"but this scheduler runs the table {self._name!r}, made for its own {count} model calls: pass "
        if num_inference_steps is not None and num_inference_steps != count:
            raise ValueError(f"num_inference_steps={num_inference_steps}, {only}num_inference_steps={count}")
        if timesteps is not None and not _near(timesteps, self._times, 0.0 if edm else 0.51):
            raise ValueError(f"timesteps={list(timesteps)}, {only}num_inference_steps={count}, or {self._times}")
        own = [s / (1 + s) for s in self._called] if flow else self._called
        # Several pipelines of flow models pass the first of these lists when their user gave none.
        same = [[*np.linspace(1.0, 1.0 / count, count)]] * flow + [own, [*own, 0.0]]
        if sigmas is not None and not any(_near(sigmas, each) for each in same):
            raise ValueError(f"sigmas={list(sigmas)}, {only}num_inference_steps={count}, or {own}")
        whole = not edm and not flow and all(t == round(t) for t in self._times)
        made = torch.tensor(self._times, dtype=torch.float64).to(torch.int64 if whole else torch.float32)
        self.timesteps = made.to(device)
        end = self._levels[-1]
        self.sigmas = torch.tensor([*own, end / (1 + end) if flow else end], dtype=torch.float32)
        self._first: int = 0
        self._step_index: int | None = None
        self._begin_index = None
        self._held: tuple[dict[int, torch.Tensor], ...] = ({}, {}, {})

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The state is what the network is shown."""
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Any) -> torch.Tensor:
        """``a (x0 + sigma n)`` at each sample's timestep: the state that this scheduler would start from there."""
        given = torch.as_tensor(timesteps).reshape(-1).tolist()
        if self._begin_index is None:
            pairs = [self._state_at(t) for t in given]
        else:
            call = self._begin_index if self._step_index is None else self._step_index
            pairs = [self._state_of(call)] * len(given)
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        weights = torch.tensor(pairs, dtype=dtype, device=original_samples.device)
        a, b = weights.T.reshape(2, -1, *[1] * (original_samples.ndim - 1))
        return (a * original_samples.to(dtype) + b * noise.to(dtype)).to(original_samples.dtype)

    def scale_noise(self, sample: torch.Tensor, timestep: Any, noise: torch.Tensor | None = None) -> torch.Tensor:
        """:meth:`add_noise` under the name, and with the arguments, of flow models."""
        if noise is None:
            raise ValueError("scale_noise needs the noise to add: pass noise=torch.randn_like(sample)")
        return self.add_noise(sample, noise, timestep)

    @torch.no_grad()
    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Takes the network's output at ``sample`` (both (B, ...)) to the next call's state, or to the result.

        Channels of the output beyond the sample's are a learned variance and are ignored. Also returns x0 as predicted.

        Raises:
            ValueError: the run is over, or the output has another shape.
        """
        if self._step_index is None:
            self._step_index = self._find(timestep) if self._begin_index is None else self._begin_index
            self._first = self._calls[self._step_index] if self._step_index else 0
        call = self._step_index
        if call >= len(self._calls):
            raise ValueError(f"all {call} steps are done: call set_timesteps() before the next picture")
        if model_output.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        if model_output.shape != sample.shape:
            raise ValueError(f"the model's output is {tuple(model_output.shape)} for a {tuple(sample.shape)} sample")
        dtype = torch.promote_types(sample.dtype, torch.float32)
        row, state = self._calls[call], sample.to(dtype)
        points, outputs, _ = self._held
        points[row] = state / self._scales[call]
        if call == 0:
            # Points from before the first call are multiples of the one that it sees.
            points.update({k: points[row] * (gain / self._gains[-1]) for k, gain in enumerate(self._gains[:-1])})
        outputs[row] = self._to_x0(state, model_output.to(dtype), self._called[call])
        denoised = outputs[row].to(sample.dtype)
        stop = self._calls[call + 1] if call + 1 < len(self._calls) else len(self._rows)
        # The dtype that stock schedulers draw in, so that one seed means one picture.
        drawn = dtype if self._path == "flow" else model_output.dtype
        for k in range(row, stop):
            points[k + 1] = self._follow(k, row, sample, {"generator": generator, "dtype": drawn})
            for held in self._held:
                for old in [i for i in held if i <= k + 1 - self._depth and i < row]:
                    del held[old]
        self._step_index += 1
        result = (points[stop] * self._state_of(call + 1)[0]).to(sample.dtype)
        if stop == len(self._rows):
            self._held = ({}, {}, {})
        return DDPMSchedulerOutput(result, denoised) if return_dict else (result, denoised)

    def _follow(self, k: int, called: int, sample: torch.Tensor, draw: dict[str, Any]) -> torch.Tensor:
        """The point that row ``k`` makes, noise included; ``called`` is the row of the newest output."""
        parts = list(self._rows[k])
        if k in self._drawn:
            self._held[2][k] = randn_tensor(sample.shape, device=sample.device, **draw)
        lost = 0.0
        if any(i < self._first for part in parts for i, _ in part):
            # The run began in the middle: a first-order step, down to what the row's noise leaves of its level.
            rest = self._levels[k + 1] ** 2 - sum(w * w for _, w in parts[2])
            keep = math.sqrt(max(rest, 0.0)) / self._levels[k]
            lost = math.sqrt(sum(w * w for i, w in parts[2] if i < self._first))
            parts = [((k, keep),), ((called, 1 - keep),), tuple(t for t in parts[2] if t[0] >= self._first)]
        total = torch.zeros_like(self._held[0][k])
        for held, terms in zip(self._held, parts, strict=True):
            for i, w in terms:
                total.add_(held[i].to(total.dtype), alpha=w)
        if lost:
            total.add_(randn_tensor(sample.shape, device=sample.device, **draw).to(total.dtype), alpha=lost)
        return total

    def _to_x0(self, state: torch.Tensor, out: torch.Tensor, sigma: float) -> torch.Tensor:
        a, b = self._ab(sigma)
        kind = self._kind
        if kind == "sample":
            return out
        if kind == "epsilon":
            return (state - b * out) / a
        return a * state - b * out if kind == "v_prediction" else state - b * out

    def _ab(self, sigma: float) -> tuple[float, float]:
        """The weights of picture and noise in the state at a level."""
        if self._path == "edm":
            return 1.0, sigma
        a = 1 / (1 + sigma) if self._path == "flow" else 1 / math.hypot(1.0, sigma)
        return a, a * sigma

    def _model_times(self, given: Sequence[float] | None) -> list[float]:
        """What the network is told at each call."""
        if given is not None and len(given) != len(self._calls):
            raise ValueError(f"model_timesteps has {len(given)} numbers for {len(self._calls)} model calls")
        times = list(self._called)
        if self._path == "flow":
            if max(times) > 1.0001 * PURE_NOISE:
                raise ValueError(f"level {max(times):g} is beyond pure noise, which is written as {PURE_NOISE:g}")
            times = [self._count * s / (1 + s) for s in times]
        elif self._path == "vp":
            times = self._indices()
        return times if given is None else [float(t) for t in given]

    def _indices(self) -> list[float]:
        """Indices of the called levels in the trained table, log sigma linear in between."""
        beta = {key: self.config[key] for key in BETAS}
        stock: Any = DDPMScheduler(**{**beta, "trained_betas": beta["trained_betas"] and list(beta["trained_betas"])})
        # Stock schedulers multiply in float32, others in float64: a level of either is a trained one.
        kept = (stock.alphas_cumprod.double(), torch.cumprod(1 - stock.betas.double(), 0))
        tables = [_log_sigmas(each.numpy(), max(self._called)) for each in kept]
        self._table, found = tables[0], []
        low, high = math.exp(self._table[0]), math.exp(self._table[-1])
        for s in self._called:
            if not 0.99 * low <= s <= 1.01 * high:
                raise ValueError(
                    f"the table calls the model at sigma {s:g}, and this model knows {low:.5g} to {high:.5g}: make the "
                    "table on the model's own range of levels"
                )
            pair = [float(np.interp(math.log(s), table, np.arange(len(table)))) for table in tables]
            near = [round(u) for u in pair if abs(u - round(u)) <= 1e-4]
            found.append(float(near[0]) if near else pair[0])
        return found

    def _leading_gains(self) -> list[float]:
        """What the rows before the first call multiply the start by, up to the point that this call sees."""
        gains = [1.0]
        for k in range(self._calls[0]):
            points, _, noises = self._rows[k]
            gains.append(sum(gains[i] * w for i, w in points))
            if noises or gains[-1] == 0:
                raise ValueError(f"row {k} adds noise, or forgets the start, before the first model call: leave it out")
        return gains

    def _state_of(self, call: int) -> tuple[float, float]:
        """Weights of picture and noise in the state that a call sees; the result's after the last one."""
        if call >= len(self._calls):
            return self._ab(self._levels[-1])
        return self._scales[call], self._scales[call] * self._levels[self._calls[call]]

    def _state_at(self, time: float) -> tuple[float, float]:
        """:meth:`_state_of` by the timestep; one that is not on the grid is looked up in the model's table."""
        near = _calls_at(self._times, time)
        if near is not None:
            return self._state_of(near)
        if self._path == "edm":
            return self._ab(time)
        if self._path == "flow":
            return 1 - time / self._count, time / self._count
        return self._ab(math.exp(np.interp(time, np.arange(len(self._table)), self._table)))

    def _find(self, timestep: Any) -> int:
        near = _calls_at(self._times, float(timestep))
        if near is None:
            raise ValueError(f"timestep {float(timestep):g} is none of this scheduler's: {self._times}")
        return near


def _log_sigmas(kept: np.ndarray, highest: float) -> np.ndarray:
    """Increasing log levels of cumulative alphas; a last one of zero SNR stands for the sampler's highest level."""
    with np.errstate(divide="ignore"):
        logs = 0.5 * (np.log1p(-kept) - np.log(kept))
    if logs[-1] > math.log(4000.0):
        logs[-1] = math.log(highest) if math.log(highest) > logs[-2] + 1e-3 else math.log(PURE_NOISE)
    return logs


def _calls_at(times: list[float], time: float) -> int | None:
    """The call at a timestep. Of two the second, unless the first is the start: the first of a pair is a trial step."""
    calls = [i for i, t in enumerate(times) if abs(t - time) <= 1e-5 * max(1.0, abs(t))]
    return calls[1] if len(calls) > 1 and calls[0] > 0 else next(iter(calls), None)


def _near(given: Sequence[float], own: Sequence[float], slack: float = 0.0) -> bool:
    """Whether two lists agree up to rounding to three decimals, and ``slack``."""
    a, b = np.asarray(given, dtype=np.float64), np.asarray(own, dtype=np.float64)
    return a.shape == b.shape and bool((abs(a - b) <= slack + 1e-3 * np.maximum(1.0, abs(b))).all())


def _terms(weights: Sequence[float], k: int) -> tuple[tuple[int, float], ...]:
    """Non-zero weights by absolute row."""
    return tuple((k - j, float(w)) for j, w in enumerate(weights) if w)
