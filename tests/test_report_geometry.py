"""The geometry of trajectories: every quantity on ones that are known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fewstep.core.exact import Mixture
from fewstep.core.noise import Noise
from fewstep.core.sample import sample
from fewstep.core.solver import build
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.grid.karras import karras
from fewstep.report import geometry
from fewstep.report.geometry import Curves, measure_geometry
from fewstep.solve.teacher import Teacher
from known_gaussians import LEVELS, exact_table, exact_teacher, gaussian


def curves_of(problem: Mixture, levels: Tensor = LEVELS) -> Curves:
    return Curves.of(exact_teacher(problem, levels))


# shape


@pytest.mark.parametrize("variance", [0.0, 0.6], ids=["point mass", "isotropic"])
def test_a_straight_trajectory_neither_deviates_nor_bends(variance: float) -> None:
    curves = curves_of(gaussian(*[variance] * 5))
    if variance:
        # The direction from the last point on is the same, but the end is the denoised point, a little further.
        assert (curves.outputs[-1] - curves.points[-2]).abs().max() > 1e-5
    assert geometry.deviation(curves).max() < 1e-13 and geometry.turning(curves).max() < 1e-12
    assert geometry.curvature(curves).max() < 1e-9
    assert torch.allclose(geometry.project(curves).shares, torch.ones(5, 3, dtype=torch.float64), atol=1e-13)


def test_distance_of_a_point_mass_falls_like_the_level() -> None:
    found = geometry.distance(curves_of(gaussian(0.0, 0.0, 0.0)))
    assert torch.allclose(found[:-1] / found[0], (LEVELS / LEVELS[0])[:, None].expand(-1, 5), rtol=1e-12)
    assert not found[-1].any()


def test_a_gaussian_of_two_variances_stays_in_a_plane_through_its_mean() -> None:
    problem = gaussian(0.01, 0.01, 2.0, 2.0, 2.0)
    curves = curves_of(problem)
    found = geometry.project(curves)
    for i in range(5):
        offsets = torch.linalg.svdvals(curves.points[:-1, i] - problem.means[0])
        assert offsets[2] < 1e-12 * offsets[0] < offsets[1]
    assert (found.shares[:, 1:] > 1 - 1e-13).all() and (found.shares[:, 0] < 1 - 1e-6).all()
    assert found.coordinates[..., 2].abs().max() < 1e-12
    # The end is the denoised last point, so that the third dimension of three variances does show.
    assert geometry.project(curves_of(gaussian(0.01, 0.2, 2.0, 9.0))).coordinates[..., 2].abs().max() > 1e-3


def test_coordinates_are_distances_and_deviations_in_a_frame_of_their_own() -> None:
    curves = curves_of(gaussian(0.01, 0.3, 2.0))
    found = geometry.project(curves).coordinates
    assert torch.allclose(found.norm(dim=2), geometry.distance(curves), atol=1e-12)
    assert torch.allclose(found[..., 1:].norm(dim=2), geometry.deviation(curves), atol=1e-12)
    assert not found[-1].any() and found[0, :, 1:].abs().max() < 1e-12 and (found[0, :, 0] > 0).all()
    assert (found[..., 1:].amax(0) >= -found[..., 1:].amin(0)).all()


def test_projection_does_not_see_a_rotation_of_the_data() -> None:
    curves = curves_of(gaussian(0.01, 0.3, 2.0))
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    turned = Curves(curves.levels, curves.points @ turn, curves.outputs @ turn)
    a, b = geometry.project(curves), geometry.project(turned)
    assert torch.allclose(a.coordinates, b.coordinates, atol=1e-10) and torch.allclose(a.shares, b.shares, atol=1e-12)
    for measure in (geometry.distance, geometry.deviation, geometry.turning, geometry.curvature):
        assert torch.allclose(measure(curves), measure(turned), rtol=1e-8, atol=1e-12)


def test_a_circle_has_the_curvature_of_its_radius() -> None:
    radius, rate = 3.0, 0.05
    s = LEVELS[:, None]
    points = radius * torch.cat([(rate * s).cos(), (rate * s).sin()], 1)
    slopes = radius * rate * torch.cat([-(rate * s).sin(), (rate * s).cos()], 1)
    curves = Curves(torch.cat([LEVELS, torch.zeros(1)]), torch.cat([points, points[-1:]])[:, None], points[:, None])
    curves = Curves(curves.levels, curves.points, (points - s * slopes)[:, None])
    # Lengths are per element: a radius of 3 in two dimensions has the root mean square 3 / sqrt(2).
    assert torch.allclose(geometry.curvature(curves)[:, 0], torch.full_like(LEVELS[1:], 2**0.5 / radius), rtol=1e-9)
    assert torch.allclose(geometry.turning(curves)[:, 0], -rate * LEVELS.diff(), rtol=1e-10)


def test_curvature_approaches_that_of_the_formula_in_second_order() -> None:
    problem, errors = gaussian(0.05, 1.5), []
    for count in (40, 80, 160):
        levels = karras(count, 0.1, 5.0, to_zero=False)
        curves = curves_of(problem, levels)
        start = curves.points[0] - problem.means[0]
        s = curves.between[:, None, None]
        total = problem.variances[0] + s**2
        scale = start / (problem.variances[0] + levels[0] ** 2).sqrt()
        first, second = scale * s / total.sqrt(), scale * problem.variances[0] / total**1.5
        exact = (first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]).abs() / first.norm(dim=2) ** 3
        errors.append(float((geometry.curvature(curves) / (2**0.5 * exact) - 1).abs().max()))
    assert errors[0] < 0.05 and errors[0] / errors[1] > 3.5 and errors[1] / errors[2] > 3.5


def test_curves_begin_where_they_are_told() -> None:
    teacher = exact_teacher(gaussian(0.1, 1.0))
    curves = Curves.of(teacher, 5.0)
    assert curves.levels[:-1].tolist() == [s for s in LEVELS.tolist() if s <= 5.0]
    assert torch.equal(curves.points[-1], teacher.end) and curves.levels[-1] == 0
    with pytest.raises(InputError, match=r"top=0\.021"):
        Curves.of(teacher, 0.021)


# errors


def test_an_exact_table_has_no_errors() -> None:
    problem = Mixture(torch.zeros(1, 3), 0.7, sigma_min=0.02, sigma_max=20.0)
    teacher = exact_teacher(problem)
    table = exact_table(0.7, LEVELS[::4])
    assert len(geometry.inner_points(table)) == table.rows + 1 and not any(geometry.inner_points(table))
    assert geometry.local_errors(problem, table, teacher).max() < 1e-13
    assert geometry.global_errors(problem, table, teacher)[1].max() < 1e-12
    euler = build("euler", LEVELS[::4])
    assert geometry.local_errors(problem, euler, teacher).min() > 1e-3


STAGED = ["heun", "dpm2", "dpmpp2s", "dpmpp3s", "dpm3"]


@pytest.mark.parametrize("name", STAGED)
def test_stages_of_one_step_methods_are_inside_their_steps(name: str) -> None:
    table = build(name, LEVELS[::4])
    ends = [k for k, inside in enumerate(geometry.inner_points(table)) if not inside]
    assert torch.equal(table.levels[ends], LEVELS[::4]) and len(ends) < table.rows + 1


@pytest.mark.parametrize("name", ["euler", "dpmpp2m", "dpmpp3m", "ipndm", "lms", "unipc", "deis"])
@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_multi_step_methods_have_no_stages(name: str, count: int) -> None:
    table = build(name, karras(count, 0.02, 20.0))
    assert table.rows == count and not any(geometry.inner_points(table))


@pytest.mark.parametrize("name", STAGED)
def test_local_errors_of_one_step_methods_are_those_of_each_step_run_by_itself(name: str) -> None:
    problem = gaussian(0.05, 0.4, 1.5)
    teacher, table = exact_teacher(problem), build(name, LEVELS[::4])
    found = geometry.local_errors(problem, table, teacher)
    ends = [k for k, inside in enumerate(geometry.inner_points(table)) if not inside]
    for a, b in itertools.pairwise(ends):
        made = sample(problem, teacher.at(float(table.levels[a])), table[a:b])
        wanted = (made - teacher.at(float(table.levels[b]))).square().mean(1).sqrt()
        assert torch.allclose(found[b - 1], wanted, rtol=1e-9, atol=1e-14) and float(wanted.min()) > 0


def test_local_errors_of_a_multi_step_method_take_their_history_from_the_teacher() -> None:
    problem, levels = gaussian(0.05, 0.4, 1.5), LEVELS[::3]
    teacher = exact_teacher(problem)
    found = geometry.local_errors(problem, build("dpmpp2m", levels), teacher)
    x = [teacher.at(s) for s in levels.tolist()]
    for k in range(1, len(levels) - 1):
        before, a, b = levels[k - 1 : k + 2].tolist()
        h, r = math.log(a / b), math.log(before / a) / math.log(a / b)
        out = (1 + 1 / (2 * r)) * problem(x[k], a) - 1 / (2 * r) * problem(x[k - 1], before)
        made = math.exp(-h) * x[k] - math.expm1(-h) * out
        assert torch.allclose(found[k], (made - x[k + 1]).square().mean(1).sqrt(), rtol=1e-9)


@pytest.mark.parametrize(("name", "power"), [("euler", 2), ("heun", 3), ("dpmpp2m", 3)])
def test_local_errors_fall_one_order_faster_than_the_method_has(name: str, power: int) -> None:
    problem, sums = gaussian(0.05, 0.4, 1.5), []
    for count in (64, 128):
        levels = torch.logspace(1, -1, count + 1, dtype=torch.float64)
        table = build(name, levels)
        rows = [k for k in range(table.rows) if not geometry.inner_points(table)[k + 1]]
        found = geometry.local_errors(problem, table, exact_teacher(problem, levels))[rows]
        sums.append(float(found[count // 2].mean()))
    assert abs(math.log2(sums[0] / sums[1]) - power) < 0.2


def test_the_last_global_error_is_sampler_minus_teacher() -> None:
    problem = gaussian(0.05, 0.4, 1.5)
    teacher, table = exact_teacher(problem), build("dpmpp2m", LEVELS[::4])
    levels, found = geometry.global_errors(problem, table, teacher)
    made = sample(problem, teacher.start, table)
    assert torch.equal(levels, table.levels[1:])
    assert torch.allclose(found[-1], (made - teacher.at(table.end)).square().mean(1).sqrt(), rtol=1e-12)
    # The first step has no history, so that its local error is all that has come together.
    assert torch.allclose(found[0], geometry.local_errors(problem, table, teacher)[0], rtol=1e-12)


def test_a_silent_sampler_still_has_its_end_compared() -> None:
    problem, table = gaussian(0.05, 1.5), build("euler", LEVELS)

    class Silent:
        start, end, nfe = table.start, table.end, table.nfe

        def __call__(self, D, x, cond=None, *, noise=None, on_step=None):  # type: ignore[no-untyped-def]
            return sample(D, x, table)

    teacher = exact_teacher(problem)
    levels, found = geometry.global_errors(problem, Silent(), teacher)
    assert levels.tolist() == [table.end]
    assert torch.equal(found, geometry.global_errors(problem, table, teacher)[1][-1:])


def test_local_errors_refuse_noise_and_part_of_the_pixels() -> None:
    problem = gaussian(0.05, 1.5)
    teacher = exact_teacher(problem)
    with pytest.raises(InputError, match="adds noise"):
        geometry.local_errors(problem, build("euler_ancestral", LEVELS), teacher)
    part = Teacher(LEVELS, teacher.start, teacher.points[..., :1], teacher.outputs[..., :1], torch.tensor([0]), {})
    with pytest.raises(InputError, match="all pixels"):
        geometry.local_errors(problem, build("euler", LEVELS), part)


# stability


def test_spread_is_what_a_run_on_the_gaussian_shows() -> None:
    table = build("dpmpp2m", karras(6, 0.02, 20.0))
    for variance in (1e-3, 0.4, 50.0):
        problem = Mixture(torch.zeros(1, 1), variance)
        sigma = math.sqrt(variance + 400)
        made = sample(problem, torch.tensor([[sigma]], dtype=torch.float64), table)
        found = geometry.spread(table, [variance])
        assert float(found[-1]) == pytest.approx(float(made.abs()) / math.sqrt(variance), rel=1e-12)
        assert float(found[0]) == pytest.approx(1, rel=1e-14)


def test_spread_of_euler_is_its_product_of_gains_and_of_an_exact_table_1() -> None:
    variances = torch.logspace(-4, 2, 13, dtype=torch.float64)
    gain = torch.ones_like(variances)
    for a, b in itertools.pairwise(LEVELS):
        gain = gain * (b / a + (1 - b / a) * variances / (variances + a**2))
    exact = ((variances + LEVELS[-1] ** 2) / (variances + LEVELS[0] ** 2)).sqrt()
    assert torch.allclose(geometry.spread(build("euler", LEVELS), variances)[-1], gain / exact, rtol=1e-11)
    assert (geometry.spread(exact_table(0.7, LEVELS), [0.7]) - 1).abs().max() < 1e-11


def test_spread_counts_the_noise_of_an_ancestral_sampler() -> None:
    variances = torch.tensor([1e-3, 0.5, 30.0], dtype=torch.float64)
    power = variances + LEVELS[0] ** 2
    for a, b in itertools.pairwise(LEVELS):
        up = b**2 * (a**2 - b**2) / a**2
        down = (b**2 - up).sqrt()
        power = (down / a + (1 - down / a) * variances / (variances + a**2)) ** 2 * power + up
    found = geometry.spread(build("euler_ancestral", LEVELS), variances)
    assert torch.allclose(found[-1], (power / (variances + LEVELS[-1] ** 2)).sqrt(), rtol=1e-11)


def test_spread_stays_exact_from_pure_noise_and_has_no_value_where_nothing_is_left() -> None:
    levels = torch.tensor([1e8, 1e3, 80.0], dtype=torch.float64)
    assert torch.allclose(geometry.spread(build("euler", levels), [1.0])[-1], torch.ones(1).double(), rtol=1e-2)
    found = geometry.spread(build("euler", karras(4, 0.02, 20.0)), [0.0, 1.0])
    assert found[-1, 0].isnan() and found[-1, 1].isfinite()
    for wrong in ([-1.0], [math.inf]):
        with pytest.raises(InputError, match="variances"):
            geometry.spread(build("euler", LEVELS), wrong)


def test_orders_are_those_of_the_solver_that_made_the_table() -> None:
    assert all(abs(v - 1) < 0.15 for v in geometry.orders(build("euler", LEVELS)).values())
    with pytest.raises(InputError, match="adds noise"):
        geometry.orders(build("euler_ancestral", LEVELS))
    with pytest.raises(InputError, match="fitted or cut"):
        geometry.orders(exact_table(0.7, LEVELS))


# all of it


def test_teacher_levels_hold_the_levels_of_the_table() -> None:
    problem = gaussian(0.05, 1.5)
    for table in (build("heun", karras(7, 0.02, 20.0)), build("euler", karras(200, 0.02, 20.0))):
        levels = geometry.teacher_levels(problem, table)
        wanted = {s for s in table.levels.tolist() if s > 0}
        assert wanted <= set(levels.tolist()) and (levels.diff() < 0).all() and len(levels) > 96
    flow = Mixture(torch.zeros(1, 2), 0.25, sigma_min=0.01, sigma_max=1e8)
    levels = geometry.teacher_levels(flow, build("euler", [1e8, 3.0, 0.5, 0.0]))
    assert levels[0] == 1e8 and 80.0 in levels.tolist() and float(levels[-1]) == pytest.approx(0.01)
    # Levels that differ by rounding are one.
    near = geometry.teacher_levels(problem, build("euler", [20.0, 1.0, 1.0 - 1e-9, 0.1]))
    assert float((near[:-1] / near[1:]).log().min()) > 1e-3


def test_measured_trajectories_are_the_known_ones() -> None:
    problem, noise = gaussian(0.05, 0.4, 1.5), Noise.of(4, 8)
    table = build("dpmpp2m", karras(8, 0.02, 20.0))
    found = measure_geometry(problem, table, noise, {}, name="2m")
    start = noise.normal(problem.shape, "start", dtype=torch.float64) * 20
    end = problem(problem.flow(start, 20.0, 0.02), 0.02)
    assert torch.allclose(found.curves.points[0], start) and (found.curves.points[-1] - end).abs().max() < 1e-3
    assert found.converged < 1e-3 and found.local is not None and found.local.shape == found.total.shape == (8, 8)
    made = sample(problem, start, table)
    assert torch.allclose(found.total[-1], (made - end).square().mean(1).sqrt(), atol=1e-3)
    again = measure_geometry(problem, table, noise, {})
    assert torch.equal(found.total, again.total) and torch.equal(found.local, again.local)


def test_measuring_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, table = gaussian(0.05, 1.5), build("euler", LEVELS)
    with pytest.raises(InputError, match="at least 8 samples, got 7"):
        measure_geometry(problem, table, Noise.of(0, 7), {})
    upward = Tableau([0.02], [0.02, 20.0], [[1.0]], [[0.0]], [[0.0]])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected one that denoises"):
        measure_geometry(problem, upward, Noise.of(0, 8), {})
    monkeypatch.setattr(geometry, "MEMORY", 1)
    many = Mixture(torch.zeros(1, 100), 1.0, sigma_min=0.02, sigma_max=20.0)
    with pytest.raises(InputError, match="pass fewer --samples"):
        measure_geometry(many, table, Noise.of(0, 8), {})
