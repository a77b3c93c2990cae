"""What the page of a run draws: from its log and its monitor to charts."""

from __future__ import annotations

from collections.abc import Iterator

from fewstep.report.plots import INK, NOT_LOSSES, PALETTE, Health, health_series, look_of, points_of, smooth
from fewstep.report.run_plots import Chart, Curve, Mark
from fewstep.report.run_view import RunView
from fewstep.report.table import show


def sections(view: RunView) -> Iterator[tuple[str, str, list[Chart]]]:
    """Heading, what to know, and the charts of each part of the page; some parts may have none."""
    marks, colours = _marks(view), _colours(view)
    quality = _alone(view, [k for k in _keys(view) if k.startswith("quality/")], marks, colours)
    energy = points_of(view.entries, "health/energy")
    if energy:
        said = "Energy distance in pixels, in units of the reference's own spread; 0 is the same law."
        line = Curve("distance to the reference", energy, PALETTE[4])
        quality.append(Chart("Quality of the samples", [line], said, marks, zero=True))
    yield (
        "Quality and health of the samples",
        "",
        [*quality, *(_health(h, marks) for h in health_series(view.entries, least=1))],
    )
    training = _alone(view, [k for k in _keys(view) if k.endswith("/loss")], marks, colours)
    norms = _smoothed(view, [k for k in _keys(view) if k.endswith("/grad_norm")], colours)
    training += [Chart("Gradient norm", norms, "Before clipping; healthy: flat or falling.", marks)] if norms else []
    rates = _rates(view, colours)
    training += [Chart("Learning rate", rates, "", marks, zero=True)] if rates else []
    yield "Losses, gradients and learning rates", "Faint: as logged. Line: moving average.", training
    yield "Speed and machine", "", list(_machine_charts(view, marks))


def _role(key: str) -> str:
    """The role, or the roles, that a key of the log belongs to."""
    return key.partition("/")[0]


def _colours(view: RunView) -> dict[str, str]:
    """A colour for each role, the same in all charts."""
    roles = dict.fromkeys(_role(k) for k in _keys(view) if k.endswith(("/loss", "/grad_norm")))
    roles |= dict.fromkeys(name for line in view.reports for name in line.get("rates", {}))
    return {role: PALETTE[k % len(PALETTE)] for k, role in enumerate(roles)}


def _marks(view: RunView) -> list[Mark]:
    found = [Mark(float(e["step"]), f"collapsed: {e['collapsed']}", ill=True) for e in view.log if "collapsed" in e]
    found += [Mark(float(e["to"]), f"rolled back: {e['why']}", ill=True) for e in view.facts.get("rollbacks", [])]
    return found + [Mark(float(e["step"]), "resumed") for e in view.events if e["event"] == "resumed" and e["step"]]


def _keys(view: RunView) -> list[str]:
    """The keys of the log that hold numbers, in the order of their appearance."""
    keys = dict.fromkeys(k for e in view.log for k, v in e.items() if isinstance(v, int | float) or v is None)
    return [k for k in keys if k not in (*NOT_LOSSES, "rollbacks")]


def _smoothed(view: RunView, keys: list[str], colours: dict[str, str]) -> list[Curve]:
    found: list[Curve] = []
    for key in keys:
        raw = points_of(view.log, key)
        if raw:
            line = _average(raw)
            name = key.removesuffix("/grad_norm").removesuffix("/loss").removeprefix("quality/")
            found.append(Curve(name, line, colours.get(_role(key), PALETTE[0]), raw))
    return found


def _average(raw: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A moving average over a twentieth of the run."""
    values = smooth([v for _, v in raw], max(3.0, len(raw) / 20))
    return [(step, value) for (step, _), value in zip(raw, values, strict=True)]


def _alone(view: RunView, keys: list[str], marks: list[Mark], colours: dict[str, str]) -> list[Chart]:
    """A chart for each key: losses of roles are of different sizes."""
    found = []
    for key in keys:
        for curve in _smoothed(view, [key], colours):
            loss = key.endswith("/loss")
            heading = f"Loss of {curve.name.replace('+', ' and ')}" if loss else curve.name
            found.append(Chart(heading, [curve], _parts(view, _role(key)) if loss else "", marks))
    return found


def _parts(view: RunView, role: str) -> str:
    """The newest values of what a loss is made of."""
    last = view.last
    skipped = ("loss", "grad_norm")
    parts = {k.partition("/")[2]: v for k, v in last.items() if k.partition("/")[0] == role and v is not None}
    told = ", ".join(f"{name} {show(value)}" for name, value in parts.items() if name not in skipped)
    return f"Its parts now: {told}." if told else ""


def _health(h: Health, marks: list[Mark]) -> Chart:
    curves = []
    for k, (key, points) in enumerate(h.series.items()):
        name, colour, dashed = look_of(key, k)
        curves.append(Curve(name, points, "currentColor" if colour == INK else colour, dashed=dashed))
    return Chart(h.title, curves, h.caption.replace(" Dotted: collapsed.", ""), marks, log=h.log)


def _rates(view: RunView, colours: dict[str, str]) -> list[Curve]:
    """The learning rates; roles that share one share a curve, because equal ones would hide each other."""
    found: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name in dict.fromkeys(name for line in view.reports for name in line.get("rates", {})):
        points = ((float(line["step"]), line["rates"][name]) for line in view.reports if name in line.get("rates", {}))
        found.setdefault(tuple(points), []).append(name)
    return [Curve(", ".join(names), points, colours[names[0]]) for points, names in found.items()]


def _machine_charts(view: RunView, marks: list[Mark]) -> Iterator[Chart]:
    speeds = view.speeds()
    if speeds:
        line = _average(speeds)
        yield Chart("Images per second", [Curve("images/s", line, PALETTE[1], speeds)], "", marks, log=False, zero=True)
    memory = [
        Curve(name, [(s, v / 1e9) for s, v in points], PALETTE[k])
        for k, (key, name) in enumerate(
            (("memory", "process"), ("device_memory", "accelerator"), ("device_peak", "its peak"))
        )
        if (points := points_of(view.reports, key))
    ]
    if memory:
        yield Chart("Memory in GB", memory, "", marks, log=False, zero=True, unit=" GB")
    busy = [
        Curve(name, points, PALETTE[k])
        for k, (key, name) in enumerate((("cores", "cores of this process"), ("load", "load of the machine")))
        if (points := points_of(view.reports, key))
    ]
    if busy:
        yield Chart("Processor", busy, "", marks, log=False, zero=True)
