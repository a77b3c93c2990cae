"""Multi-student distillation: the router is total, disjoint and exact, one student is the base run, stages resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.cond import Classes
from fewstep.core.denoiser import Precond
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.network import build_network, describe_network
from fewstep.core.noise import Noise
from fewstep.core.state import load_tensors
from fewstep.data import Images
from fewstep.data.of_classes import OfClasses, labels_of
from fewstep.distill import SFD, Progressive
from fewstep.distill.dmd2 import DMD2
from fewstep.distill.front import distill
from fewstep.distill.msd import MSD, ScoreMatching, continued, shares
from fewstep.distill.vsd import VSD
from fewstep.errors import InputError
from fewstep.guide import guided
from fewstep.models.frozen import network_under
from fewstep.models.lora import LoRA
from fewstep.models.router import Routed, RoutedConfig, routed, shrunk
from tiny_runs import STEADY, Stop, StopsAfter, differing, furthest, tiny, tiny_data

INNER = DMD2(sigma_init=2.5, ratio=2, student=STEADY, fake=STEADY)
SMALL: dict[str, Any] = {"width": 16, "embedding": 8, "blocks": 1}
OPTIONS: dict[str, Any] = {"batch": 4, "log_every": 2, "save_every": 2, "progress": False}


def shaken(seed: int) -> Precond:
    """A denoiser of 4x4 pictures in three classes with random weights."""
    made, g = network_under(tiny().denoiser), torch.Generator().manual_seed(seed)
    for p in made.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    return made.requires_grad_(False).eval()


def weights(folder: Path) -> dict[str, Tensor]:
    return load_tensors(folder / "student.safetensors")


def labels(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed))


# ---- the router


@pytest.mark.parametrize("routes", [(0, 1, 2), (1, 0, 1), (2, 2, 0, 1, 1, 0, 2), (0,)])
def test_routing_is_total_and_disjoint(routes: tuple[int, ...]) -> None:
    nets = tuple(describe_network(shaken(0).net) for _ in range(max(routes) + 1))
    made = Routed(RoutedConfig(nets, routes))
    label = torch.randint(0, len(routes), (40,), generator=torch.Generator().manual_seed(1))
    places = made.places({"label": label})
    assert len(places) == len(nets)
    assert torch.equal(torch.cat(places).sort().values, torch.arange(40)), "every sample is in one place"
    for k, rows in enumerate(places):
        assert [routes[c] for c in label[rows].tolist()] == [k] * len(rows)
        assert torch.equal(rows, rows.sort().values)


def test_the_router_is_each_student_on_its_own_samples() -> None:
    students = [shaken(1), shaken(2)]
    one, label = routed(students, (1, 0, 1)), labels(17)
    x, sigma = torch.randn(17, 1, 4, 4, generator=torch.Generator().manual_seed(2)), torch.linspace(0.1, 9, 17)
    out = one(x, sigma, {"label": label})
    for i in range(17):
        own = students[0 if label[i] == 1 else 1](x[i : i + 1], sigma[i : i + 1], {"label": label[i : i + 1]})
        assert float((out[i] - own[0]).abs().max()) < 1e-5
    assert float((students[0](x, sigma, {"label": label}) - out).abs().max()) > 1e-2, "the students differ"
    same = torch.ones(17, dtype=torch.int64)
    assert torch.equal(one(x, sigma, {"label": same}), students[0](x, sigma, {"label": same})), "one batch, bit for bit"


def test_a_routed_generator_is_saved_and_opened(tmp_path: Path) -> None:
    made = replace(tiny(), denoiser=routed([shaken(1), shaken(2)], (0, 1, 1)))
    made.save(tmp_path)
    opened = Generator.load(tmp_path)
    cond = {"label": [0, 1, 2, 0, 2]}
    assert torch.equal(opened.sample(cond=cond, progress=False), made.sample(cond=cond, progress=False))
    net = opened.denoiser.net  # type: ignore[attr-defined]
    assert isinstance(net, Routed) and net.config.routes == (0, 1, 1)
    assert torch.equal(net.routes, torch.tensor([0, 1, 1]))
    assert describe_network(build_network(describe_network(net))) == describe_network(net)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: routed([shaken(0)], (0, 1, 0)), "number of a network, 0 to 0"),
        (lambda: routed([shaken(0), shaken(1)], (0, 0, 0)), "network 1 of 2 has no class"),
        (lambda: routed([shaken(0), replaced(sigma_max=50.0)], (0, 1, 0)), "differs from number 0 in sigma_max"),
        (lambda: routed([shaken(0)] * 2, (0, 1, 0))(torch.zeros(2, 1, 4, 4), 1.0, {}), "has none: pass one"),
        (lambda: asked([0, -1]), "1 of 2 labels are of no class"),
        (lambda: asked([3, 4]), "2 of 2 labels are of no class"),
        (lambda: shrunk(routed([shaken(0)] * 2, (0, 1, 0)), 0.5), "cannot be made smaller"),
        (lambda: shrunk(shaken(0), 0.9), "leaves 16 width as they are"),
    ],
)
def test_what_the_router_refuses(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def replaced(**fields: Any) -> Precond:
    made = shaken(1)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def asked(label: list[int]) -> Tensor:
    return routed([shaken(0), shaken(1)], (0, 1, 0))(torch.zeros(2, 1, 4, 4), 1.0, {"label": torch.tensor(label)})


# ---- data of some classes


class Lazy:
    """Pictures whose labels are known only when they are taken."""

    name, fingerprint, shape, classes = "lazy", "0", (1, 4, 4), 3

    def __len__(self) -> int:
        return 48

    def take(self, ids: Tensor) -> Any:
        return tiny_data().take(ids)


def test_pictures_of_some_classes() -> None:
    data = tiny_data()
    found = labels_of(data)
    assert torch.equal(found, labels_of(Lazy()))
    some = OfClasses(data, found, (0, 2))
    assert len(some) == 32 and some.frequencies == [0.5, 0.0, 0.5] and some.shape == data.shape and some.classes == 3
    batch = some.take(torch.arange(32))
    assert set(batch.cond["label"].tolist()) == {0, 2}
    assert torch.equal(batch.x, data.take((found != 1).nonzero()[:, 0]).x)  # type: ignore[arg-type]
    assert some.fingerprint != OfClasses(data, found, (0, 1)).fingerprint
    assert OfClasses(data, found, (0, 1, 2)).std == pytest.approx(data.std)
    with pytest.raises(InputError, match="does not exist"):
        some.take(torch.tensor([32]))
    with pytest.raises(InputError, match="have no labels"):
        labels_of(Images("bare", torch.zeros(3, 1, 4, 4)))


# ---- the division


def test_classes_are_divided() -> None:
    many = replace(tiny(), conds=Classes((0.1,) * 10))
    assert MSD(students=4).routes(many) == (0, 0, 0, 1, 1, 2, 2, 2, 3, 3)
    assert MSD(students=10).routes(many) == tuple(range(10))
    assert MSD(students=2, assign=(1, 0, 1)).routes(tiny()) == (1, 0, 1)
    assert shares((0.5, 0.2, 0.3), (1, 0, 1), 2) == pytest.approx([0.2, 0.8])


def test_one_student_is_the_base_run(tmp_path: Path) -> None:
    base = distill(tiny(), INNER, tiny_data(), out=tmp_path / "a", budget=4, **OPTIONS)
    made = distill(tiny(), MSD(students=1, inner=INNER), tiny_data(), out=tmp_path / "b", budget=4, **OPTIONS)
    assert differing(weights(tmp_path / "a"), weights(tmp_path / "b")) == []
    assert torch.equal(base.sample(6, progress=False), made.sample(6, progress=False))


def test_each_student_is_a_run_on_its_own_classes(tmp_path: Path) -> None:
    method = MSD(students=2, assign=(1, 0, 1), inner=INNER)
    made = distill(tiny(), method, tiny_data(), out=tmp_path / "all", budget=6, **OPTIONS)
    found = labels_of(tiny_data())
    for k, (kept, steps) in enumerate((((1,), 2), ((0, 2), 4))):
        alone = replace(tiny(), conds=Classes(tuple(1 / 3 if c in kept else 0.0 for c in range(3))))
        out = tmp_path / str(k)
        single = distill(alone, INNER, OfClasses(tiny_data(), found, kept), out=out, budget=steps, **OPTIONS)
        assert differing(weights(out), weights(tmp_path / "all" / "students" / f"{k:02d}")) == []
        cond = {"label": [kept[0]] * 4}
        assert torch.equal(single.sample(cond=cond, progress=False), made.sample(cond=cond, progress=False))
    assert made.sampler.nfe == 1 and made.card["routes"] == [1, 0, 1]
    opened = Generator.load(tmp_path / "all")
    assert torch.equal(opened.sample(9, progress=False), made.sample(9, progress=False))
    assert opened.conds == tiny().conds


def test_an_undivided_budget_is_each_students(tmp_path: Path) -> None:
    method = MSD(students=3, inner=INNER, divided=False)
    made = distill(tiny(), method, tiny_data(), out=tmp_path, budget=2, **OPTIONS)
    assert [s["stages"][-1]["step"] for s in made.card["students"]] == [2, 2, 2]


class Stopped(StopsAfter):
    """Data with what a student's part of them asks for."""

    @property
    def labels(self) -> Tensor:
        return self.data.labels

    name = property(lambda self: self.data.name)
    shape = property(lambda self: self.data.shape)
    classes = property(lambda self: self.data.classes)


STAGED = MSD(students=2, inner=INNER, size=0.5, matching=0.4, plain=0.3, optim=STEADY)


def test_a_resumed_run_and_micro_batches(tmp_path: Path) -> None:
    # Cut in the first student's first stage, and in the second student's.
    options = {**OPTIONS, "micro": 2}
    whole = distill(tiny(), STAGED, tiny_data(), out=tmp_path / "whole", budget=24, **options)
    for k, left in enumerate((5, 30)):
        out = tmp_path / f"cut{k}"
        with pytest.raises(Stop):
            distill(tiny(), STAGED, Stopped(tiny_data(), left), out=out, budget=24, **options)
        again = distill(tiny(), STAGED, tiny_data(), out=out, budget=24, resume=True, **options)
        assert differing(weights(tmp_path / "whole"), weights(out)) == []
        assert torch.equal(whole.sample(6, progress=False), again.sample(6, progress=False))
    finished = distill(tiny(), STAGED, tiny_data(), out=tmp_path / "whole", budget=24, resume=True, **options)
    assert torch.equal(whole.sample(6, progress=False), finished.sample(6, progress=False))
    assert finished.card["students"] == whole.card["students"]
    distill(tiny(), STAGED, tiny_data(), out=tmp_path / "one", budget=24, **OPTIONS)
    assert furthest(weights(tmp_path / "whole"), weights(tmp_path / "one"))[0] < 2e-3
    with pytest.raises(InputError, match="another recipe"):
        distill(
            tiny(), replace(STAGED, plain=0.2), tiny_data(), out=tmp_path / "one", budget=24, resume=True, **OPTIONS
        )
    again = distill(tiny(), STAGED, tiny_data(), out=tmp_path / "one", budget=12, overwrite=True, **OPTIONS)
    assert again.card["students"][0]["stages"][-1]["step"] == 3, "nothing is left of the run before"


# ---- smaller students


def test_smaller_students_are_smaller_and_go_through_all_stages(tmp_path: Path) -> None:
    made = distill(tiny(), STAGED, tiny_data(), out=tmp_path, budget=12, **OPTIONS)
    net = made.denoiser.net  # type: ignore[attr-defined]
    assert [n.config.width for n in net.nets] == [8, 8] and tiny().denoiser.net.config.width == 16  # type: ignore[attr-defined]
    assert [f["stage"] for f in made.card["students"][0]["stages"]] == ["matching", "plain", "DMD2"]
    names = {p.name for p in (tmp_path / "students").iterdir()}
    assert names == {"00", "00-matching", "00-plain", "01", "01-matching", "01-plain"}
    first = weights(tmp_path / "students" / "00-matching")
    later = weights(tmp_path / "students" / "00")
    assert first.keys() == later.keys() and differing(first, later)


def test_score_matching_is_zero_for_the_teacher_itself_and_learns_it_otherwise() -> None:
    start, method = tiny(), ScoreMatching()
    m = build_models(method.roles(start), "cpu")
    batch, noise = tiny_data().take(torch.arange(8)), Noise.of(0, 8)
    m.student.requires_grad_(True)
    update = next(method.step(m, batch, 0, noise))
    other = update.loss()
    assert float(other.detach()) > 1e-4  # type: ignore[arg-type]
    other.backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in m.student.parameters())
    assert all(p.grad is None for p in m.teacher.parameters())
    m.networks["student"] = m.teacher
    assert float(next(method.step(m, batch, 0, noise)).loss().detach()) == 0  # type: ignore[arg-type]


def test_score_matching_touches_the_conditions_of_its_part_alone() -> None:
    start = tiny()
    m = build_models(ScoreMatching().roles(start), "cpu")
    part = OfClasses(tiny_data(), labels_of(tiny_data()), (2,))
    # A fresh network ends in zeros, behind which nothing has a gradient.
    m.student.load_state_dict(shrunk_like(m.student))
    m.student.requires_grad_(True)
    next(ScoreMatching().step(m, part.take(torch.arange(8)), 0, Noise.of(0, 8))).loss().backward()  # type: ignore[union-attr]
    tables = [p for n, p in m.student.named_parameters() if p.ndim == 2 and len(p) in (3, 4) and "embed" in n]
    assert tables, "the network has a table of classes"
    used = tables[0].grad.abs().sum(1) > 0  # type: ignore[union-attr]
    assert int(used.sum()) == 1


def shrunk_like(network: Any) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {k: v + 0.1 * torch.randn(v.shape, generator=g) for k, v in network.state_dict().items()}


def test_the_next_stage_starts_where_the_last_one_ended() -> None:
    start = tiny()
    other = replace(start, denoiser=shaken(5))
    m = build_models(continued(INNER, other).roles(start), "cpu")
    assert differing(m.student.state_dict(), other.denoiser.state_dict()) == []  # type: ignore[attr-defined]
    assert differing(m.fake.state_dict(), start.denoiser.state_dict()) == []  # type: ignore[attr-defined]
    assert m.student is not other.denoiser


# ---- other inner methods


@pytest.mark.parametrize(
    ("inner", "steps"),
    [(VSD(sigma_init=2.5), 1), (VSD(), 2), (SFD(steps=2, between=1), 2), (Progressive(steps=2, start_steps=4), 2)],
)
def test_any_inner_method(inner: Any, steps: int, tmp_path: Path) -> None:
    method = MSD(students=2, steps=steps, inner=inner)
    data = tiny_data() if method.needs_data else None
    made = distill(guided(tiny(), 2.0), method, data, out=tmp_path, budget=4, **OPTIONS)
    assert made.sampler.nfe == steps == method.sampler(tiny()).nfe
    assert isinstance(network_under(made.denoiser).net, Routed)
    assert torch.equal(Generator.load(tmp_path).sample(4, progress=False), made.sample(4, progress=False))


def many() -> Images:
    return Images("two", torch.rand(8, 1, 4, 4), torch.arange(8) % 2, classes=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MSD(students=0), "students >= 1"),
        (lambda: MSD(size=1.5), "size within"),
        (lambda: MSD(size=0.5, matching=0.6, plain=0.4), "together below 1"),
        (lambda: MSD(plain=0.5, inner=DMD2(gan=0.0)), "needs an inner method with a GAN term"),
        (lambda: MSD(inner=DMD2(steps=4)), "MSD of 1 steps does not go with DMD2 of 4"),
        (lambda: MSD(size=0.5, steps=4, inner=Progressive(steps=4)), "cannot start the stages of Progressive"),  # type: ignore[arg-type]
        (lambda: MSD(students=4).routes(tiny()), "cannot divide 3 classes among 4"),
        (lambda: MSD(students=2, assign=(0, 1)).routes(tiny()), "a student for each of 3 classes, got 2"),
        (lambda: MSD(students=2, assign=(0, 0, 0)).routes(tiny()), "network 1 of 2 has no class"),
        (lambda: MSD(students=2, assign=(0, 0, 2)).routes(tiny()), "number of a network"),
        (lambda: MSD().routes(replace(tiny(), conds=None)), "this teacher has none"),
        (lambda: MSD(students=3).routes(replace(tiny(), conds=Classes((1, 1, 0)))), "classes of student 2 never"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "data", "options", "message"),
    [
        (MSD(students=3, inner=INNER), many, {}, r"no picture of classes \(2,\) of student 2"),
        (MSD(students=2, inner=DMD2(gan=0.0), size=0.5), lambda: None, {}, "learns from data and got none"),
        (MSD(students=2, size=0.5), tiny_data, {"lora": LoRA(rank=2)}, "smaller students have their own"),
        (MSD(students=2, size=0.95), tiny_data, {}, "choose a smaller one"),
    ],
)
def test_refused_before_any_work(method: Any, data: Any, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        distill(tiny(), method, data(), out=tmp_path / "out", budget=2, **OPTIONS, **options)
    assert not (tmp_path / "out").exists()
