"""The estimate of memory: exact parts exactly, a step's peak against the allocator's, and what saves memory."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fewstep.core.fit import _Loop, build_models
from fewstep.core.generator import Generator
from fewstep.core.memory import Live, human
from fewstep.core.options import FitOptions
from fewstep.core.role import Role
from fewstep.data.conditions import ConditionsOnly
from fewstep.distill import SiD
from fewstep.errors import InputError
from fewstep.models.checkpointing import blocks_of, checkpointed
from fewstep.models.lora import LoRA
from fewstep.models.offload import offloaded
from fewstep.train.memory import estimate_memory
from fewstep.train.roles import roles_of
from tiny_runs import METHODS, bits, differing, furthest, run, tiny, tiny_data

METHOD = SiD()


def unet(channels: int = 16) -> Generator:
    return tiny("unet", channels=channels, multipliers=(1,), blocks=1, attention=())


def size(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def allocated(options: FitOptions, lora: LoRA | None) -> tuple[int, int]:
    """Bytes kept, and what torch's allocator hands out at most in a second step on top, told by the profiler."""
    models = build_models(roles_of(METHOD, unet(), lora), "cpu")
    loop = _Loop(METHOD, models, ConditionsOnly(None), options, None)
    around = checkpointed(models.networks.values()) if options.checkpointing else contextlib.nullcontext()
    with around:
        loop.step(0, 0.0, loop.load(0))
        loop.sums.clear()
        parts = loop.load(1)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            loop.advance(1, 0.0, parts)
    now = peak = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    backbone = size(unet().denoiser)
    adapters = [*models.networks.values(), *models.averages.values()] if lora else models.averages.values()
    weights = sum(size(m) for m in (models.networks.values() if lora is None else [])) + (backbone if lora else 0)
    own = sum(size(m) for m in adapters if size(m) < backbone or not lora)
    moments = sum(t.nbytes for o in loop.optimizers.values() for s in o.state.values() for t in s.values())
    return weights + own + moments, peak


CASES: dict[str, tuple[dict[str, Any], LoRA | None]] = {
    "full": ({}, None),
    "micro": ({"micro": 2}, None),
    "checkpointing": ({"checkpointing": True}, None),
    "lora": ({}, LoRA(rank=2)),
}


@pytest.fixture(scope="module")
def estimates() -> dict[str, Any]:
    return {
        name: estimate_memory(METHOD, unet(), None, FitOptions(batch=256, **options), lora=lora)
        for name, (options, lora) in CASES.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_what_the_allocator_says(name: str, estimates: dict[str, Any]) -> None:
    options, lora = CASES[name]
    kept, peak = allocated(FitOptions(batch=256, **options), lora)
    found = estimates[name]
    assert found.total - found.activations - found.gradients == pytest.approx(kept, rel=0.01)
    assert found.total == pytest.approx(kept + peak, rel=0.15)


def test_what_saves_memory_does(estimates: dict[str, Any]) -> None:
    full, lora = estimates["full"], estimates["lora"]
    assert estimates["micro"].activations < 0.6 * full.activations
    assert estimates["checkpointing"].activations < 0.6 * full.activations
    parts = [sum(getattr(r, part) for r in full.roles.values()) for part in ("weights", "optimizer", "ema")]
    small = [sum(getattr(r, part) for r in lora.roles.values()) for part in ("weights", "optimizer", "ema")]
    assert small[0] < 0.6 * parts[0] and small[1] < 0.3 * parts[1]


def test_weights_and_moments_are_exact(estimates: dict[str, Any]) -> None:
    bytes_ = size(unet().denoiser)
    parameters = sum(p.nbytes for p in unet().denoiser.parameters())
    for name, role in estimates["full"].roles.items():
        assert role.weights == bytes_
        assert role.gradients == (0 if name == "teacher" else parameters)
        steps = 4 * sum(1 for _ in unet().denoiser.parameters())
        assert role.optimizer == (0 if name == "teacher" else 2 * parameters + steps)
        assert role.ema == (bytes_ if name == "student" else 0)
    assert estimates["lora"].roles["teacher"].weights == bytes_, "the backbone counts once, in the teacher"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_told_and_the_teacher_left_alone(name: str) -> None:
    start, method = tiny(), METHODS[name]
    before = {k: v.clone() for k, v in start.denoiser.state_dict().items()}
    state = torch.get_rng_state()
    data = tiny_data() if method.needs_data else None
    found = estimate_memory(method, start, data, FitOptions(batch=8))
    assert set(found.roles) == set(method.roles(start)) and found.activations > 0
    assert differing(before, start.denoiser.state_dict()) == [] and torch.equal(state, torch.get_rng_state())
    assert all(not type(p).__name__.startswith("Fake") for p in start.denoiser.parameters())


def test_a_run_after_an_estimate_is_the_run_without(tmp_path: Path) -> None:
    run("SFD", tmp_path / "a", budget=2)
    estimate_memory(METHODS["SFD"], tiny(), None, FitOptions(batch=8, micro=2))
    run("SFD", tmp_path / "b", budget=2)
    assert differing(bits(tmp_path / "a"), bits(tmp_path / "b")) == []


def test_live_counts_storages_once_and_forgets_them() -> None:
    with Live() as live:
        a = torch.zeros(1000)
        b = a[10:].reshape(2, -1)
        assert live.now == 4000 and b.shape == (2, 495)
        c = a + 1
        del c
        assert (live.now, live.peak) == (4000, 8000)
        del a
        assert live.now == 4000, "a view keeps the storage"
        del b
        assert live.now == 0
    assert human(1536) == "1.50 KiB" and human(3 * 2**30) == "3.00 GiB" and human(7) == "7 B"


def test_a_method_that_reads_values_is_refused() -> None:
    class Reads(SiD):
        def step(self, *args: Any) -> Any:
            for update in super().step(*args):
                yield update._replace(loss=lambda u=update: u.loss() * float(u.loss().detach()))

    with pytest.raises(InputError, match="Reads reads values of tensors"):
        estimate_memory(Reads(), unet(8), None, FitOptions(batch=64))
    with pytest.raises(InputError, match="learns from data and got none"):
        estimate_memory(METHODS["EDMTraining"], unet(8))


# ---- checkpointing


@pytest.mark.parametrize("name", METHODS)
def test_checkpointing_trains_the_same_bits(name: str, tmp_path: Path) -> None:
    start = [unet(8), unet(8)]
    run(name, tmp_path / "a", start=start[0], budget=2)
    run(name, tmp_path / "b", start=start[1], budget=2, checkpointing=True)
    assert furthest(bits(tmp_path / "a"), bits(tmp_path / "b"))[0] < 1e-6
    assert all("forward" not in m.__dict__ for m in start[1].network.modules())


def test_blocks() -> None:
    net = unet().denoiser.net  # type: ignore[attr-defined]
    assert len(blocks_of(net)) == len(net.encoder) + len(net.middle) + len(net.decoder)
    with pytest.raises(InputError, match=r"nothing to checkpoint: Linear"), checkpointed([nn.Linear(1, 1)]):
        pass
    block, x = net.middle[0], torch.randn(2, 16, 4, 4)
    with checkpointed([net]):
        assert "forward" in block.__dict__
        with torch.no_grad():
            assert not block(x, torch.randn(2, 64)).requires_grad
    assert "forward" not in block.__dict__


# ---- offloading


def test_offloaded_networks_compute_and_send_gradients_as_before() -> None:
    pytest.importorskip("accelerate")
    start = unet(8)
    start.network.requires_grad_(False)
    made: Any = offloaded(start.network, "cpu")
    assert all(p.is_meta for p in made.parameters()) and not any(p.is_meta for p in start.network.parameters())
    grads = []
    for network in (start.denoiser, made):
        x = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4).requires_grad_(True)
        out = network(x, 1.0, {"label": torch.tensor([0, -1])})
        out.square().sum().backward()
        grads.append((out.detach(), x.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    assert all(p.is_meta for p in made.parameters()), "nothing stays behind"
    models = build_models(
        {"teacher": Role(lambda: start.network), "b": Role(lambda: copy.deepcopy(start.network), METHOD.fake)},
        "cpu",
        offload=lambda network: offloaded(network, "cpu"),
    )
    assert all(p.is_meta for p in models.teacher.parameters()) and not any(p.is_meta for p in models.b.parameters())


def test_estimates_leave_offloaded_weights_out() -> None:
    on, off = (
        estimate_memory(METHOD, unet(8), None, FitOptions(batch=8, device="cuda", offload=o)) for o in (True, False)
    )
    assert off.offloaded == 0 and on.offloaded == off.roles["teacher"].weights
    assert off.total - on.total <= on.offloaded and on.total < off.total


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"offload": True}, "offload moves frozen weights to host memory, where device 'cpu' has them"),
        ({"lora_roles": ("student",)}, "need lora"),
        ({"lora": LoRA(rank=2, targets=("to_q",))}, "ResMLP has no to_q for LoRA"),
    ],
)
def test_what_is_refused_leaves_no_folder(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        run("SiD", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# ---- the command line


def test_dry_run_tells_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewstep.cli import main

    unet(8).save(tmp_path / "gen")
    monkeypatch.chdir(tmp_path)
    line = "distill sid --teacher gen --batch 8 --dry-run --out out --lora 2"
    main(line.split())
    told = capsys.readouterr().out
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()
    assert "total at the peak" in told and "teacher" in told and "optimizer" in told
    for more, message in (
        ("--lora-alpha 2", "needs --lora RANK"),
        ("--offload", "offload moves frozen weights to host memory, where device 'cpu' has them"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*line.split()[:-2], *more.split()])
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="with LoRA the teacher's weights are the student's"):
        estimate_memory(METHOD, unet(8), None, FitOptions(batch=8, device="cuda", offload=True), lora=LoRA(rank=2))
    line = "distill sid --teacher gen --batch 8 --budget 2 --out out --checkpointing --lora 2"
    main(f"{line} --lora-roles student --lora-targets qkv leave".split())
    card = Generator.load(tmp_path / "out").card["lora"]
    assert card["roles"] == ["student"] and card["targets"] == ["qkv", "leave"] and (tmp_path / "out/lora").is_dir()
