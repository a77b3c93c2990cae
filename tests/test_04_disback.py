"""Distribution backtracking: its schedule, the way that it records on exact Gaussians, broken and resumed runs."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Cond
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.role import Models, Role
from fewstep.core.state import load_tensors, read_json
from fewstep.distill.disback import BACK, Backtracking, Changing, Degradation, DisBack, loaded
from fewstep.distill.dmd2 import DMD2
from fewstep.distill.front import distill
from fewstep.errors import InputError
from fewstep.guide import guided
from fewstep.models.lora import LoRA
from tiny_runs import STEADY, Stop, StopsAfter, bits, differing, furthest, log_of, tiny, tiny_data

SETTINGS: dict[str, Any] = {"sigma_init": 2.5, "ratio": 2, "student": STEADY, "fake": STEADY}
METHOD = DisBack(nodes=2, record=0.5, degrade=STEADY, **SETTINGS)
OPTIONS: dict[str, Any] = {
    "budget": 8, "batch": 8, "micro": 2, "log_every": 2, "save_every": 2, "progress": False,
}  # fmt: skip


def run(out: Path, *, method: DisBack = METHOD, stop: int | None = None, **options: Any) -> Generator:
    """A whole run in ``out``; ``stop`` ends it with :class:`Stop` after that many steps of all stages together."""
    options = OPTIONS | options
    data = tiny_data() if stop is None else StopsAfter(tiny_data(), stop * options["micro"])
    return method.run(tiny(), data if method.needs_data else None, out=out, **options)


def whole(out: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint and of the generator of every stage, and the student's."""
    parts = sorted((out / "stages").iterdir())
    found = {f"{p.name}/{k}": t for p in parts for k, t in bits(p).items()}
    return found | {f"top/{k}": t for k, t in load_tensors(out / "student.safetensors").items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("disback") / "run"
    run(out)
    return out


# ---- the schedule


@pytest.mark.parametrize("nodes", [0, 1, 2, 5])
@pytest.mark.parametrize("back", [0.3, 0.5, 1.0])
def test_the_checkpoints_go_down_to_the_teacher_and_stay_there(nodes: int, back: float) -> None:
    method = DisBack(nodes=nodes, back=back)
    found = [method.node_at(p / 1000) for p in range(1001)]
    assert found == sorted(found, reverse=True), "never away from the teacher"
    assert found[0] == max(nodes - 1, 0) and found[-1] == 0
    assert all(n == 0 for p, n in enumerate(found) if p > 1000 * back)
    counts = [found.count(n) for n in range(1, max(nodes, 1))]
    assert all(abs(c - 1000 * back / (nodes - 1)) <= 1 for c in counts), "each for the same share"


# ---- the recorded way


class Linear(nn.Module):
    """The denoiser of one centred Gaussian, with its spread as parameter."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.tensor(spread))
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1, 1, 1), 0.002, 80.0, 0.5

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        level = torch.as_tensor(sigma, dtype=torch.float32).reshape(-1, 1, 1, 1)
        return self.spread**2 / (self.spread**2 + level**2) * x


class Student(nn.Module):
    """``c z`` for an input ``sigma z``."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c))
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1, 1, 1), 0.002, 80.0, 0.5

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        return self.c * x / sigma


def models(**networks: nn.Module) -> Models:
    return build_models({name: Role(lambda net=net: net) for name, net in networks.items()}, "cpu")


def test_the_way_leads_from_the_teacher_to_the_student_and_back_in_smaller_pulls() -> None:
    teacher, own = 1.3, 0.3
    m = models(student=Student(own), fake=Linear(teacher))
    method, spreads = Degradation(sigma_init=2.0, gan=0.0), [teacher]
    for i in range(60):
        (update,) = method.step(m, Batch(None, {}), i, Noise.of(i, 128))
        m.fake.requires_grad_(True)
        update.loss().backward()  # type: ignore[union-attr]
        m.fake.requires_grad_(False)
        with torch.no_grad():
            m.fake.spread -= 0.02 * m.fake.spread.grad.sign()
        m.fake.zero_grad()
        if i % 12 == 11:
            spreads.append(float(m.fake.spread))
    assert all(a > b > own - 0.05 for a, b in pairwise(spreads)), spreads
    assert spreads[-1] == pytest.approx(own, abs=0.15)
    assert m.student.c.grad is None
    pulls = []
    for spread in spreads:
        at = models(student=Student(own), fake=Linear(own), teacher=Linear(spread))
        update = next(DMD2(sigma_init=2.0, gan=0.0, normaliser="none").step(at, Batch(None, {}), 0, Noise.of(0, 500)))
        at.student.requires_grad_(True)
        update.loss()["loss"].backward()  # type: ignore[index]
        pulls.append(abs(float(at.student.c.grad)))
    assert pulls == sorted(pulls, reverse=True) and pulls[-1] < 0.5 * pulls[0]


def test_the_student_is_left_as_it_is_while_the_way_is_recorded() -> None:
    method = METHOD.degradation(0, [])
    m = build_models(method.roles(tiny()), "cpu")
    updates = list(method.step(m, tiny_data().take(torch.arange(8)), 0, Noise.of(0, 8)))
    assert [u.roles for u in updates] == [("fake",)] and m.roles["student"].optim is None
    again = METHOD.degradation(1, [Path("nowhere")])
    first, second = (float(next(k.step(m, Batch(None, {}), 0, Noise.of(0, 8))).loss()) for k in (method, again))
    assert first != second, "checkpoints have noise of their own"


def test_every_checkpoint_goes_on_from_the_one_before(finished: Path) -> None:
    start = tiny().denoiser.state_dict()
    nodes = [load_tensors(finished / f"stages/node-{k}/student.safetensors") for k in (1, 2)]
    apart = [sum(float((n[k] - start[k]).square().sum()) for k in start) for n in nodes]
    assert 0 < apart[0] < apart[1]
    sampler: Any = Generator.load(finished / "stages/node-1").sampler
    assert sampler.name == tiny().sampler.name and sampler.nfe == tiny().sampler.nfe, "no student's"  # type: ignore[union-attr]


# ---- the teacher on its way back


def test_the_teacher_has_one_checkpoint_at_a_time_and_ends_as_itself(finished: Path) -> None:
    start = tiny()
    before = copy.deepcopy(start.denoiser.state_dict())
    places = tuple(finished / f"stages/node-{k}" for k in (1, 2))
    changing = Changing(guided(start, 2.0), places)
    g = torch.Generator().manual_seed(0)
    x, cond = torch.randn(5, 1, 4, 4, generator=g), {"label": torch.arange(5) % 3}
    for node in (2, 1, 0):
        changing.turn(node)
        plain = start if node == 0 else Generator.load(places[node - 1])
        assert torch.equal(changing(x, 1.0, cond), guided(plain, 2.0).denoiser(x, 1.0, cond)), node
    assert len(list(changing.parameters())) == len(before), "one network"
    assert all(torch.equal(v, before[k]) for k, v in start.denoiser.state_dict().items())


def test_the_second_stage_follows_the_share_of_the_budget(finished: Path) -> None:
    method = METHOD.backtracking([finished / f"stages/node-{k}" for k in (1, 2)])
    m = build_models(method.roles(tiny()), "cpu")
    last = load_tensors(finished / "stages/node-2/student.safetensors")
    assert all(torch.equal(v, last[k]) for k, v in m.fake.state_dict().items()), "it fits the student already"
    seen = []
    for progress in (0.0, 0.4, 0.5, 1.0):
        m.progress = progress
        list(method.step(m, tiny_data().take(torch.arange(8)), 1, Noise.of(0, 8)))
        seen.append(m.teacher.node)
    assert seen == [1, 1, 0, 0]
    plain = Backtracking(nodes=2, ready=False, places=method._places, **SETTINGS)  # type: ignore[attr-defined]
    m = build_models(plain.roles(tiny()), "cpu")
    assert all(torch.equal(v, tiny().denoiser.state_dict()[k]) for k, v in m.fake.state_dict().items())


# ---- runs


def test_without_checkpoints_it_is_dmd2_in_every_bit(tmp_path: Path) -> None:
    run(tmp_path / "a", method=DisBack(nodes=0, **SETTINGS), budget=4)
    distill(tiny(), DMD2(**SETTINGS), tiny_data(), out=tmp_path / "b", **(OPTIONS | {"budget": 4}))
    assert differing(bits(tmp_path / "a/stages" / BACK), bits(tmp_path / "b")) == []
    top = load_tensors(tmp_path / "a/student.safetensors"), load_tensors(tmp_path / "b/student.safetensors")
    assert differing(*top) == []


@pytest.mark.parametrize("stop", [1, 3, 5, 7])
def test_a_resumed_run_is_the_same_in_every_bit(finished: Path, tmp_path: Path, stop: int) -> None:
    with pytest.raises(Stop):
        run(tmp_path, stop=stop)
    assert not (tmp_path / "fewstep.json").exists()
    run(tmp_path, resume=True)
    assert differing(whole(finished), whole(tmp_path)) == []
    kept = [[{k: v for k, v in e.items() if k != "seconds"} for e in log_of(p)] for p in (finished, tmp_path)]
    assert kept[0] == kept[1] and len(kept[0]) == 3


def test_two_micro_batches_are_one_batch(finished: Path, tmp_path: Path) -> None:
    run(tmp_path, micro=1)
    assert furthest(whole(finished), whole(tmp_path))[0] < 2e-3


def test_resuming_a_finished_run_trains_nothing(finished: Path) -> None:
    before = whole(finished)
    made = run(finished, resume=True, stop=0)
    assert differing(before, whole(finished)) == []
    card = read_json(finished / "fewstep.json")["card"]
    assert card["method"] == "DisBack" and [s["stage"] for s in card["stages"]] == ["node-1", "node-2", BACK]
    assert torch.equal(Generator.load(finished).sample(3, progress=False), made.sample(3, progress=False))


def test_guided_teachers_without_data(tmp_path: Path) -> None:
    method = DisBack(nodes=1, record=0.5, gan=0.0, steps=2)
    made = distill(guided(tiny(), 2.0), method, out=tmp_path, budget=4, batch=4, progress=False)
    assert made.sampler.nfe == 2 and made.sample(3, progress=False).isfinite().all()
    assert Generator.load(tmp_path).denoiser.describe() == tiny().denoiser.describe()  # type: ignore[attr-defined]


def test_a_checkpoint_of_another_network_is_refused(finished: Path) -> None:
    with pytest.raises(InputError, match="another architecture"):
        loaded(tiny(width=8, embedding=8, blocks=1), finished / "stages/node-1")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DisBack(nodes=-1), "nodes >= 0"),
        (lambda: DisBack(record=0.0), "0 < record < 1"),
        (lambda: DisBack(record=1.0), "0 < record < 1"),
        (lambda: DisBack(back=0.0), "0 < back <= 1"),
        (lambda: DisBack(features="teacher"), "a discriminator cannot read the teacher"),
        (lambda: DisBack(steps=0), "DisBack needs steps >= 1"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (METHOD, {"lora": LoRA(2)}, "lora does not allow"),
        (METHOD, {"offload": True}, "offload does not allow"),
        (METHOD, {"budget": "soon"}, "budget 'soon'"),
        (METHOD, {"bacth": 8}, "unknown training option.*bacth"),
        (DisBack(sigma_init=500.0), {}, "outside of the teacher's"),
    ],
)
def test_bad_runs_are_refused_before_anything_is_written(
    method: DisBack, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", method=method, **options)
    assert not (tmp_path / "run").exists()


def test_data_are_asked_for_where_they_are_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="learns from data"):
        METHOD.run(tiny(), None, out=tmp_path / "a", **OPTIONS)
    run(tmp_path / "b", method=DisBack(nodes=0, **SETTINGS), budget=1)
    with pytest.raises(InputError, match=r"another recipe: settings\.nodes"):
        run(tmp_path / "b", method=DisBack(nodes=1, **SETTINGS), budget=1, resume=True)
