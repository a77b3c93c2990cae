"""A sampler is a table: one general linear method on a fixed grid.

``y[k+1] = sum_j P[k,j] y[k-j] + sum_j W[k,j] D[k-j] + sum_j Z[k,j] eps[k-j]``, where ``y[0]`` is the start,
``D[k] = D(y[k], sigmas[k])`` and ``eps[k]`` are unit noises. A solver is a function from a grid to such a table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.core.noise import Noise
from fewstep.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fewstep.core.denoiser import Denoiser
    from fewstep.core.path import Path
    from fewstep.core.sample import OnStep

FORMAT = "fewstep-tableau/1"


class Row(NamedTuple):
    """One step made ready to run: non-zero weights by absolute index, and what may be forgotten after it.

    ``mix`` is the weight of the point where a row has one point and one output whose weights sum to 1.
    """

    sigma: Tensor | None
    level: float
    points: tuple[tuple[int, float], ...]
    outputs: tuple[tuple[int, float], ...]
    noises: tuple[tuple[int, float], ...]
    drop_points: tuple[int, ...]
    drop_outputs: tuple[int, ...]
    drop_noises: tuple[int, ...]
    keep: bool
    draw: bool
    mix: float | None


@dataclass(frozen=True, eq=False)
class Tableau:
    """A sampler on a fixed grid. All tables are float64 and live on the CPU.

    Attributes:
        sigmas: (K,) level passed to the denoiser on row k; nan where the row makes no call.
        levels: (K+1,) noise level of each point; ``levels[0]`` is the start, ``levels[K]`` the end.
        P: (K, H) weights of the points y[k], y[k-1], ...
        W: (K, H) weights of the denoiser outputs of rows k, k-1, ...
        Z: (K, H) weights of the unit noises of rows k, k-1, ...
        name: what people call it.
        meta: JSON-able facts: how it was made, what was measured.

    Raises:
        InputError: shapes that do not agree, non-finite weights, or a weight on something that does not exist.
    """

    sigmas: Tensor
    levels: Tensor
    P: Tensor
    W: Tensor
    Z: Tensor
    name: str = "tableau"
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("sigmas", "levels", "P", "W", "Z"):
            # The dtype is given here, because a list of numbers would pass through float32 otherwise.
            table = torch.as_tensor(getattr(self, key), dtype=torch.float64, device="cpu")
            object.__setattr__(self, key, table.detach())
        rows = self.rows
        if rows < 1 or self.sigmas.ndim != 1:
            raise InputError(f"tableau {self.name!r}: sigmas must be (K,) with K >= 1, got {tuple(self.sigmas.shape)}")
        if self.levels.shape != (rows + 1,):
            raise InputError(f"tableau {self.name!r}: levels must be ({rows + 1},), got {tuple(self.levels.shape)}")
        for key in ("P", "W", "Z"):
            table = getattr(self, key)
            if table.ndim != 2 or len(table) != rows:
                raise InputError(f"tableau {self.name!r}: {key} must be ({rows}, H), got {tuple(table.shape)}")
            if not table.isfinite().all():
                raise InputError(f"tableau {self.name!r}: {key} holds nan or inf in row {_bad_row(table)}")
        if not self.levels.isfinite().all() or (self.levels < 0).any():
            raise InputError(f"tableau {self.name!r}: levels must be finite and >= 0, got {self.levels.tolist()}")
        called = self.sigmas[~self.sigmas.isnan()]
        if not called.isfinite().all() or (called <= 0).any():
            raise InputError(f"tableau {self.name!r}: sigmas must be positive (or nan), got {self.sigmas.tolist()}")
        self._check_history()
        # Made ready here, as plain numbers, so that a compiled run finds them as constants.
        _ = self.plan, self.waves, self.start, self.end, self.noisy

    def _check_history(self) -> None:
        silent = self.sigmas.isnan().tolist()
        for key, what in (("P", "point"), ("W", "denoiser output"), ("Z", "noise")):
            for k, j in getattr(self, key).nonzero().tolist():
                if j > k:
                    raise InputError(
                        f"tableau {self.name!r}: row {k} needs the {what} of row {k - j}, before the start"
                    )
                if key == "W" and silent[k - j]:
                    raise InputError(f"tableau {self.name!r}: row {k} weighs the output of row {k - j}, which has none")

    @property
    def rows(self) -> int:
        """Number of rows K."""
        return len(self.sigmas)

    @cached_property
    def start(self) -> float:
        """The noise level that the sampler starts from."""
        return float(self.levels[0])

    @cached_property
    def end(self) -> float:
        """The noise level of the result: 0 for a picture."""
        return float(self.levels[-1])

    @property
    def start_std(self) -> float | None:
        """The standard deviation of the start, if the sampler that this table was traced from has one of its own."""
        said = self.meta.get("traced", {}).get("start_std")
        return None if said is None else float(said)

    @property
    def nfe(self) -> int:
        """Number of denoiser evaluations."""
        return int((~self.sigmas.isnan()).sum())

    @cached_property
    def noisy(self) -> bool:
        """Whether any row adds noise."""
        return any(row.noises for row in self.plan)

    @property
    def flops(self) -> int:
        """Multiply-adds per element beside the denoiser."""
        return int(sum((t != 0).sum() for t in (self.P, self.W, self.Z)))

    @cached_property
    def live(self) -> int:
        """The most state-sized tensors that are held at once, beside a row's running sum and the caller's own start."""
        held, most = 1, 1
        for row in self.plan:
            held += int(row.sigma is not None)
            most = max(most, held)
            held += int(row.draw) - len(row.drop_points) - len(row.drop_outputs)
            most = max(most, held)
            held += int(row.keep) - len(row.drop_noises)
        return most

    @cached_property
    def waves(self) -> tuple[int, ...]:
        """For each row that starts one, how many rows can be evaluated as one batch; 0 for the rows inside a wave.

        Rows belong together while none of them weighs an output of the wave but the last, and none but the last adds
        noise. Ones everywhere, except for samplers with parallel evaluations.
        """
        sizes, k = [0] * self.rows, 0
        while k < self.rows:
            stop = k + 1
            while stop < self.rows and self._early(stop - 1, k):
                stop += 1
            sizes[k], k = stop - k, stop
        return tuple(sizes)

    def _early(self, row: int, first: int) -> bool:
        """Whether the point that ``row`` makes needs no output of rows ``first`` and later, and no noise."""
        return not self.W[row, : row - first + 1].any() and not self.Z[row].any()

    @property
    def latency(self) -> int:
        """Evaluations one after the other when those of a wave run as one batch."""
        called = (~self.sigmas.isnan()).tolist()
        return sum(any(called[k : k + size]) for k, size in enumerate(self.waves) if size)

    @cached_property
    def plan(self) -> tuple[Row, ...]:
        """The rows with absolute indices and, from a liveness analysis, what each row is the last to need."""
        terms = {key: [_terms(getattr(self, key), k) for k in range(self.rows)] for key in ("P", "W", "Z")}
        called = [k for k, s in enumerate(self.sigmas.tolist()) if not math.isnan(s)]
        # The last row to need each point, output and noise; later rows overwrite earlier ones.
        last = {"P": {k: k for k in range(self.rows)}, "W": {k: k for k in called}, "Z": dict[int, int]()}
        drop: dict[str, list[list[int]]] = {key: [[] for _ in range(self.rows)] for key in last}
        for key, ends in last.items():
            for k, row in enumerate(terms[key]):
                ends.update((i, k) for i, _ in row)
            for i, end in ends.items():
                drop[key][end].append(i)
        return tuple(
            Row(
                sigma=None if k not in last["W"] else self.sigmas[k],
                level=float(self.levels[k]),
                points=terms["P"][k],
                outputs=terms["W"][k],
                noises=terms["Z"][k],
                drop_points=tuple(drop["P"][k]),
                drop_outputs=tuple(drop["W"][k]),
                drop_noises=tuple(drop["Z"][k]),
                keep=k + 1 < self.rows,
                draw=k in last["Z"],
                mix=_mix(terms["P"][k], terms["W"][k]),
            )
            for k in range(self.rows)
        )

    def __call__(
        self,
        D: Denoiser,
        x: Tensor,
        cond: Cond | None = None,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
        grad: bool = False,
        parallel: bool = False,
    ) -> Tensor:
        """Runs the table: a Tableau is a Sampler. See :func:`fewstep.core.sample.sample`."""
        from fewstep.core.sample import sample

        return sample(D, x, self, cond, noise=noise, on_step=on_step, grad=grad, parallel=parallel)

    def __getitem__(self, rows: slice) -> Tableau:
        """The rows of a slice (step 1) as a table of their own, starting at ``levels[rows.start]``.

        Raises:
            InputError: the part is empty, or it needs points or outputs from before its first row.
        """
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise InputError(f"a tableau is sliced by rows, tableau[2:5], got {rows!r}")
        start, stop, _ = rows.indices(self.rows)
        if stop <= start:
            raise InputError(f"rows {start}:{stop} of a tableau with {self.rows} rows are empty")
        part = {key: getattr(self, key)[start:stop] for key in ("P", "W", "Z")}
        # What made the whole did not make the part; a later start is no sampler's own start.
        meta = {k: v for k, v in self.meta.items() if k not in ("solver", "options", "traced")}
        name = f"{self.name}[{start}:{stop}]"
        return Tableau(self.sigmas[start:stop], self.levels[start : stop + 1], **part, name=name, meta=meta)

    def to_json(self) -> str:
        """One JSON object; numbers are written so that reading gives the same bits."""
        body: dict[str, Any] = {"format": FORMAT, "name": self.name}
        body["sigmas"] = [None if math.isnan(s) else s for s in self.sigmas.tolist()]
        body |= {key: getattr(self, key).tolist() for key in ("levels", "P", "W", "Z")}
        body["meta"] = dict(self.meta)
        return json.dumps(body)

    @classmethod
    def from_json(cls, text: str) -> Tableau:
        """The table that :meth:`to_json` wrote.

        Raises:
            InputError: not JSON, another format, unknown or missing keys, or wrong shapes.
        """
        try:
            body = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"not a tableau: the text is not JSON ({error})") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            found = body.get("format") if isinstance(body, dict) else type(body).__name__
            raise InputError(f"not a tableau: expected an object with format {FORMAT!r}, got {found!r}")
        expected = {"format", "name", "sigmas", "levels", "P", "W", "Z", "meta"}
        if set(body) != expected:
            missing, extra = sorted(expected - set(body)), sorted(set(body) - expected)
            raise InputError(f"a tableau file has the keys {sorted(expected)}: missing {missing}, unknown {extra}")
        if not isinstance(body["meta"], dict):
            raise InputError(f"a tableau's meta must be an object, got {type(body['meta']).__name__}")
        try:
            tables = {key: torch.tensor(body[key], dtype=torch.float64) for key in ("levels", "P", "W", "Z")}
            sigmas = [math.nan if s is None else float(s) for s in body["sigmas"]]
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"a tableau's tables must be rectangular lists of numbers: {error}") from None
        return cls(torch.tensor(sigmas, dtype=torch.float64), **tables, name=str(body["name"]), meta=body["meta"])

    def order(self, path: Path | None = None, *, steps: tuple[int, ...] = (32, 64, 128)) -> float:
        """The measured order of accuracy of the solver that made this table: log2 of how its error falls.

        The table is rebuilt on grids of ``steps`` steps, uniform in the time of ``path`` (log sigma without one), and
        run on a one-dimensional mixture whose trajectories are known.

        Raises:
            InputError: the table was not made by a named solver (a fitted table belongs to one grid and has no order).
        """
        from fewstep.core.exact import measured_order

        return measured_order(self, path, steps)

    def plot(self) -> Figure:
        """A figure: the three tables as heat maps beside the levels they step through."""
        from fewstep.core.figure import tableau_figure

        return tableau_figure(self)


def _terms(table: Tensor, k: int) -> tuple[tuple[int, float], ...]:
    return tuple((k - j, w) for j, w in enumerate(table[k].tolist()) if w)


def _mix(points: tuple[tuple[int, float], ...], outputs: tuple[tuple[int, float], ...]) -> float | None:
    if len(points) != 1 or len(outputs) != 1 or abs(points[0][1] + outputs[0][1] - 1) > 1e-15:
        return None
    return points[0][1]


def _bad_row(table: Tensor) -> int:
    return int((~table.isfinite()).any(1).nonzero()[0])


class Builder:
    """Collects rows by absolute index and makes the table: how solvers write one.

    ``row(sigma, level, points, outputs, noises)`` adds the row that leads to ``level``; each mapping goes from the
    index of a point, a row's output or a row's noise to its weight.
    """

    def __init__(self, start: float) -> None:
        self.levels = [float(start)]
        self.sigmas: list[float] = []
        self.tables: dict[str, list[dict[int, float]]] = {"P": [], "W": [], "Z": []}

    @property
    def k(self) -> int:
        """The index of the next row, which is also that of the newest point."""
        return len(self.sigmas)

    def row(
        self,
        sigma: float | None,
        level: float,
        points: Mapping[int, float],
        outputs: Mapping[int, float],
        noises: Mapping[int, float] | None = None,
    ) -> int:
        """Adds a row; returns the index of the point it makes."""
        self.sigmas.append(math.nan if sigma is None else float(sigma))
        self.levels.append(float(level))
        for key, weights in (("P", points), ("W", outputs), ("Z", noises or {})):
            self.tables[key].append({i: float(w) for i, w in weights.items() if w != 0})
        return self.k

    def build(self, name: str, **meta: Any) -> Tableau:
        """The table, with the shortest history that holds every weight."""
        depth = 1 + max((k - i for rows in self.tables.values() for k, row in enumerate(rows) for i in row), default=0)
        tables = {key: torch.zeros(self.k, depth, dtype=torch.float64) for key in self.tables}
        for key, rows in self.tables.items():
            for k, row in enumerate(rows):
                for i, w in row.items():
                    tables[key][k, k - i] = w
        sigmas, levels = torch.tensor(self.sigmas, dtype=torch.float64), torch.tensor(self.levels, dtype=torch.float64)
        return Tableau(sigmas, levels, **tables, name=name, meta=meta)
