"""What a page shows, as plain values: measured rows, curves and trajectories."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fewstep.core.tableau import Tableau

Group = Literal["teacher", "solver", "calibrated", "student"]


@dataclass
class Row:
    """One way to sample, measured.

    Attributes:
        name: what people call it, such as "dpmpp-2m" or "SiD".
        group: what kind of row it is; decides colour and order.
        nfe: denoiser evaluations per picture, counted.
        metrics: by name with the sample count, such as "fd@2000".
        rmse: mean over samples of the RMSE to the teacher's converged end point at the same noise; None for students
            that do not follow it.
        seconds: wall time of sampling the pictures that were measured.
        images: how many those were.
        command: the exact shell command that gives this row's numbers again.
        pictures: (n, C, H, W) in [-1, 1] at the page's common seeds.
        tableau: the sampler, where it is a table.
    """

    name: str
    group: Group
    nfe: int
    metrics: dict[str, float]
    rmse: float | None
    seconds: float
    images: int
    command: str
    pictures: Tensor
    tableau: Tableau | None = None


@dataclass
class Trajectories:
    """Paths of a few samples under one sampler.

    Attributes:
        name: of the sampler.
        levels: (T,) noise levels, decreasing.
        points: (T, n, D) flattened states; every sampler of a page starts from the same n points.
    """

    name: str
    levels: list[float]
    points: Tensor


@dataclass
class Results:
    """Everything on a page.

    Attributes:
        title: of the page.
        summary: a few plain sentences, the conclusions first.
        data: name and size of the real data.
        rows: the table, in order.
        floor: metrics of real against real data, such as {"fd@2000": 0.8}: what no generator can be blamed for.
        curves: training logs by name; each is the list of entries of a ``log.jsonl``.
        trajectories: for the plane of the first two principal components.
        facts: machine, versions, seeds, seconds of each stage: shown as a table.
        targets: (what was asked, what was reached, whether that meets it).
    """

    title: str
    summary: list[str]
    data: str
    rows: list[Row]
    floor: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    trajectories: list[Trajectories] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    targets: list[tuple[str, str, bool]] = field(default_factory=list)
