"""Two processes that talk by gloo train what one process trains."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fewstep.core import distributed
from fewstep.core.cond import Batch
from fewstep.core.fit import build_models, fit
from fewstep.core.noise import Noise
from fewstep.core.options import Budget, FitOptions
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.state import load_tensors, save_tensors
from fewstep.data.conditions import ConditionsOnly
from fewstep.errors import InputError
from tiny_runs import Stop, bits, child, furthest, log_of, run

METHODS = ("EDMTraining", "SiD")
COMMON: dict[str, Any] = {"batch": 8, "micro": 2, "budget": 4, "log_every": 2, "save_every": 2}


class OneRankFails:
    """A method whose loss is nan on the second process alone, at step 1."""

    needs_data: ClassVar[bool] = False

    def roles(self, teacher: Any) -> dict[str, Role]:
        return {"net": Role(lambda: nn.Linear(1, 1), Optim(lr=0.1), Ema(rate=0.5))}

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        factor = float("nan") if i == 1 and distributed.rank() == 1 else 1.0
        yield Update("net", lambda: (m.net(noise.normal((1,), "x")) * factor).mean())

    def sampler(self, teacher: Any) -> Any:
        return None


def primitives(rank: int) -> dict[str, Tensor]:
    """What each process is left with by the functions that training is made of."""
    torch.manual_seed(rank)
    left: dict[str, Tensor] = {}
    random = build_models(
        {"r": Role(lambda: nn.Sequential(nn.Linear(3, 3), Buffered()), Optim(), Ema(rate=0.5))}, "cpu"
    )
    left |= {f"random.{k}": v for k, v in random.r.state_dict().items()}
    left |= {f"average.{k}": v for k, v in random.ema("r").state_dict().items()}

    used, half, never = (nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    wide = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    used.grad = torch.full((3, 2), float(rank + 1)).T  # strided
    wide.grad = torch.full((2,), 1.0 + rank * 1e-12, dtype=torch.float64)
    if rank == 0:
        half.grad = torch.full((2, 3), 5.0)
    distributed.average_gradients([used, half, wide, never, frozen])
    left |= {"used": used.grad, "half": half.grad, "wide": wide.grad, "never": never.grad}
    left["mean"] = distributed.average(torch.tensor(float(rank)))
    left["agreed"] = torch.tensor(distributed.agree(10.0 + rank))

    method = OneRankFails()
    models = build_models(method.roles(None), "cpu")
    before = models.net.weight.clone()
    options = FitOptions(Budget(3), batch=4, log_every=1)
    reports = list(fit(method, models, ConditionsOnly(None, size=8), options, None))
    left |= {"skipped": torch.tensor([r.skipped for r in reports]), "net": models.net.weight.data}
    left["moved"] = (models.net.weight - before).detach().abs()
    return left


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("random", torch.randn(3))


def worker(rank: int, port: int, folder: Path) -> None:
    """One of two processes; the second is given other places to write to, where nothing may appear."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    mine = folder if rank == 0 else folder / "forbidden"
    for name in METHODS:
        made = run(name, mine / name, **COMMON)
        save_tensors(folder / f"student-{name}-{rank}.safetensors", made.denoiser.state_dict())
    # Resuming reads, so both are given the same place; a half-finished run of one process lies there.
    made = run("SiD", folder / "resumed", resume=True, **COMMON)
    save_tensors(folder / f"student-resumed-{rank}.safetensors", made.denoiser.state_dict())
    save_tensors(folder / f"primitives-{rank}.safetensors", primitives(rank))
    try:
        FitOptions(batch=6, micro=2)
        said = "nothing"
    except InputError as error:
        said = str(error)
    (folder / f"said-{rank}.json").write_text(json.dumps([said, distributed.rank(), distributed.world()]))
    distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes left, beside that of one."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.raises(Stop):
        run("SiD", folder / "resumed", stop=3, **COMMON)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [child(worker, (rank, port, folder)) for rank in (0, 1)]
    for process in processes:
        process.join(240)
    assert [p.exitcode for p in processes] == [0, 0]
    for name in METHODS:
        run(name, folder / "single" / name, **COMMON)
    return folder


@pytest.mark.parametrize("name", [*METHODS, "resumed"])
def test_two_processes_train_what_one_trains(name: str, pair: Path) -> None:
    single = pair / "single" / ("SiD" if name == "resumed" else name)
    one, two = bits(single), bits(pair / name)
    assert any(".ema." in k for k in one)
    for part, most in (("roles/", 1e-6), ("optim/", 1e-5)):
        far, where = furthest(*({k: v for k, v in t.items() if part in k.split(":")[0]} for t in (one, two)))
        assert far < most, (far, where)
    for a, b in zip(log_of(single), log_of(pair / name), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    shipped = [load_tensors(folder / "student.safetensors") for folder in (single, pair / name)]
    assert furthest(*shipped)[0] < 1e-6
    middle, end = (load_tensors(single / f"checkpoints/0000000{i}/roles/student.safetensors") for i in (2, 4))
    assert min(float((middle[k] - end[k]).abs().max()) for k in end) > 2e-6, "more than what is tolerated"


@pytest.mark.parametrize("name", [*METHODS, "resumed"])
def test_both_processes_hold_the_same_student(name: str, pair: Path) -> None:
    first, second = (load_tensors(pair / f"student-{name}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_only_the_first_process_writes(pair: Path) -> None:
    assert not (pair / "forbidden").exists()
    assert (pair / "SiD/student.safetensors").exists() and (pair / "SiD/log.jsonl").exists()
    assert len((pair / "SiD/log.jsonl").read_text().splitlines()) == 2
    assert not list(pair.rglob("*.tmp"))


def test_random_networks_are_the_same_everywhere(pair: Path) -> None:
    first, second = (load_tensors(pair / f"primitives-{rank}.safetensors") for rank in (0, 1))
    for k in first:
        assert torch.equal(first[k], second[k]), k
    torch.manual_seed(1)
    assert not torch.equal(first["random.0.weight"], nn.Linear(3, 3).weight), "of the first process"
    assert torch.equal(first["random.0.weight"], first["average.0.weight"])
    assert torch.equal(first["random.1.random"], first["average.1.random"])


def test_gradients_are_averaged_where_only_one_process_used_a_parameter(pair: Path) -> None:
    left = load_tensors(pair / "primitives-0.safetensors")
    assert torch.equal(left["used"], torch.full((2, 3), 1.5))
    assert torch.equal(left["half"], torch.full((2, 3), 2.5))
    assert torch.equal(left["never"], torch.zeros(2, 3))
    assert left["wide"].dtype == torch.float64 and float((left["wide"] - 1 - 5e-13).abs().max()) < 1e-15
    assert float(left["mean"]) == 0.5 and float(left["agreed"]) == 10


def test_a_failure_on_one_process_is_skipped_on_both(pair: Path) -> None:
    for rank in (0, 1):
        left = load_tensors(pair / f"primitives-{rank}.safetensors")
        assert left["skipped"].tolist() == [0, 1, 1]
        assert left["net"].isfinite().all() and float(left["moved"].min()) > 0.01


def test_a_batch_that_does_not_divide_is_refused(pair: Path) -> None:
    for rank in (0, 1):
        said, its_rank, world = json.loads((pair / f"said-{rank}.json").read_text())
        assert said == "batch 6 must divide into 2 micro-batches on 2 processes" and (its_rank, world) == (rank, 2)


def test_alone_nothing_is_exchanged() -> None:
    assert (distributed.rank(), distributed.world(), distributed.agree(3.0)) == (0, 1, 3.0)
    p = nn.Parameter(torch.zeros(2))
    distributed.average_gradients([p])
    distributed.barrier()
    distributed.start(torch.device("cpu"))
    assert not torch.distributed.is_initialized() and float(distributed.average(torch.tensor(2.0))) == 2
    FitOptions(batch=6, micro=2)
