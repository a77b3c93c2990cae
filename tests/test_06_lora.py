"""LoRA on a shared backbone: views on the same weights, and training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Precond, edm
from fewstep.core.generator import Generator
from fewstep.core.role import Ema, Optim
from fewstep.core.state import Run, load_tensors
from fewstep.distill.sid import SiD, sid_loss
from fewstep.errors import InputError
from fewstep.export.lora import apply_lora, save_lora
from fewstep.models.checkpointing import checkpointed
from fewstep.models.lora import Adapted, LoRA, adapter, merge, share, targets_of, unmerge
from fewstep.train.roles import roles_of
from tiny_runs import METHODS, Stop, bits, child, differing, furthest, run, tiny

pytest.importorskip("peft")
SMALL = LoRA(rank=2, alpha=3)
X = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = {"label": torch.tensor([0, 1, -1])}


def unet() -> Generator:
    return tiny("unet", channels=8, multipliers=(1, 2), blocks=1, attention=(2,))


def moved(view: Adapted, seed: int = 0) -> Adapted:
    """The view with random LoRA weights, B too."""
    g = torch.Generator().manual_seed(seed)
    for p in view.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    return view


def far(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())


@pytest.fixture
def view() -> Adapted:
    return moved(adapter(unet().denoiser, SMALL))


# ---- views


def test_copies_are_adapters_on_the_very_same_weights() -> None:
    start = unet()
    names = list(start.denoiser.state_dict())
    shared = share(start.denoiser, SMALL)
    a, b = copy.deepcopy(shared), copy.deepcopy(shared)
    assert isinstance(a, Adapted) and isinstance(a, Precond) and list(start.denoiser.state_dict()) == names
    backbone = {p.data_ptr() for p in start.denoiser.parameters()}
    for made in (a, b):
        everything = {p.data_ptr() for p in nn.Module.named_parameters(made.net) for p in p[1:]}
        assert backbone <= everything
        own = {p.data_ptr() for p in made.parameters()}
        assert not own & backbone and everything - backbone == own
        assert far(made(X, 1.0, LABELS), start.denoiser(X, 1.0, LABELS)) == 0, "a fresh adapter is the identity"
    assert [n for n, _ in a.named_parameters()] == list(a.state_dict()) and list(a.buffers()) == []
    assert all(".lora_" in n and n.startswith("net.") for n in a.state_dict())
    assert not torch.equal(next(a.parameters()), next(b.parameters())), "every adapter has an A of its own"
    torch.manual_seed(4)
    first = adapter(start.denoiser, SMALL).state_dict()
    torch.manual_seed(4)
    assert differing(first, adapter(start.denoiser, SMALL).state_dict()) == []


def test_views_leave_each_other_and_the_teacher_alone() -> None:
    start = unet()
    start.network.eval()
    shared = share(start.denoiser, SMALL)
    before = start.denoiser(X, 1.0, LABELS)
    a, b = moved(copy.deepcopy(shared), 1), moved(copy.deepcopy(shared), 2)
    kept = copy.deepcopy(a)
    outputs = [m(X, 1.0, LABELS) for m in (a, b, shared, kept)]
    assert far(outputs[2], before) == 0 and far(outputs[0], outputs[3]) == 0
    assert min(far(outputs[0], outputs[1]), far(outputs[0], before)) > 1e-3
    moved(a, 3)
    assert far(kept(X, 1.0, LABELS), outputs[0]) == 0, "an average has values of its own"
    a.requires_grad_(True)
    assert not any(p.requires_grad for p in [*b.parameters(), *start.denoiser.parameters()])
    a.train()
    assert a.net.training and not b.net.training and not kept.net.training
    features = a.features(X, 1.0, LABELS, ["bottleneck"])
    assert far(features[0], a(X, 1.0, LABELS)) == 0 and features[1]["bottleneck"].shape[:2] == (3, 16)
    assert (a.shape, a.sigma_min, a.sigma_max) == (start.denoiser.shape, shared.sigma_min, shared.sigma_max)


def student_loss(shared: Any, a: Adapted, b: Adapted) -> Tensor:
    """SiD's: student, teacher and fake score before one backward pass."""
    x = a(X, 2.5, LABELS)
    y = x + X.flip(0)
    return sid_loss(x, shared(y, 1.0, LABELS), b(y, 1.0, LABELS), 1.2)["loss"]


def test_checkpointing_gives_the_same_gradients_with_several_views_in_a_loss() -> None:
    shared = share(unet().denoiser, LoRA(rank=2, dropout=0.3))
    a, b = moved(copy.deepcopy(shared), 1).train(), moved(copy.deepcopy(shared), 2)
    a.requires_grad_(True)
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        with checkpointed([shared, a, b] if on else []):
            student_loss(shared, a, b).backward()
        grads.append({n: p.grad for n, p in a.named_parameters()})
        a.zero_grad(set_to_none=True)
    assert furthest(*grads)[0] <= 1e-6 and max(float(g.abs().max()) for g in grads[0].values()) > 0
    assert all("forward" not in m.__dict__ for m in a.modules()), "nothing is left behind"


def test_gradients_are_those_of_full_weights_along_the_update() -> None:
    view = moved(adapter(unet().denoiser, SMALL))
    view.requires_grad_(True)
    direction = {n: torch.randn_like(p) for n, p in view.named_parameters()}
    view(X, 1.0, LABELS).square().sum().backward()
    slope = sum(float((p.grad * direction[n]).sum()) for n, p in view.named_parameters() if p.grad is not None)
    values = []
    for step in (1e-3, -1e-3):
        near = copy.deepcopy(view)
        for n, p in near.named_parameters():
            p.data += step * direction[n]
        values.append(float(merge(near)(X, 1.0, LABELS).double().square().sum()))
    assert abs((values[0] - values[1]) / 2e-3 - slope) < 0.01 * abs(slope)


def test_half_precision_backbones_train_single_precision_updates() -> None:
    start = unet()
    start.denoiser.to(torch.bfloat16)
    view = moved(adapter(start.denoiser, SMALL)).requires_grad_(True)
    view(X, 1.0, LABELS).square().sum().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in view.parameters())
    assert next(merge(view).parameters()).dtype == torch.bfloat16


def test_merge_and_back(view: Adapted) -> None:
    plain, merged = view.plain, merge(view)
    assert type(merged) is Precond and merged.describe() == unet().denoiser.describe()
    assert far(merged(X, 1.0, LABELS), view(X, 1.0, LABELS)) < 1e-5
    assert far(merged(X, 1.0, LABELS), plain(X, 1.0, LABELS)) > 1e-3
    assert far(unmerge(merged, view)(X, 1.0, LABELS), plain(X, 1.0, LABELS)) < 1e-6
    assert not {p.data_ptr() for p in merged.parameters()} & {p.data_ptr() for p in plain.parameters()}


def test_targets() -> None:
    net = unet().denoiser.net
    assert len(targets_of(net, LoRA())) == 45 and not any(
        n.startswith(("enter", "leave", "embed")) for n in targets_of(net, LoRA())
    )
    assert targets_of(net, LoRA(targets=("middle.0.attention.qkv",))) == ("middle.0.attention.qkv",)
    assert {n.rpartition(".")[2] for n in targets_of(net, LoRA(targets=("qkv", "leave")))} == {"qkv", "leave"}
    assert targets_of(net, LoRA(targets=r"middle\.\d\.conv1")) == ("middle.0.conv1", "middle.1.conv1")


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LoRA(rank=0), "rank >= 1"),
        (lambda: LoRA(alpha=0.0), "alpha > 0"),
        (lambda: LoRA(alpha=float("inf")), "finite alpha > 0"),
        (lambda: LoRA(rank=2.5), "rank must be a whole number, got 2.5"),  # type: ignore[arg-type]
        (lambda: LoRA(rank="4"), "rank must be a whole number, got '4'"),  # type: ignore[arg-type]
        (lambda: LoRA(rank=True), "rank must be a whole number, got True"),
        (lambda: LoRA(alpha="4"), "alpha must be a number, got '4'"),  # type: ignore[arg-type]
        (lambda: LoRA(dropout=None), "dropout must be a number, got None"),  # type: ignore[arg-type]
        (lambda: LoRA(targets=3), "targets must be names of layers.*got 3"),  # type: ignore[arg-type]
        (lambda: LoRA(targets=("qkv", 3)), "targets must be names of layers"),  # type: ignore[arg-type]
        (lambda: LoRA(targets=()), "targets are empty"),
        (lambda: LoRA(targets="("), "no regular expression"),
        (lambda: adapter(unet().denoiser, LoRA(targets=("qkv", "to_q"))), "UNet has no to_q for LoRA"),
        (lambda: adapter(nn.Linear(1, 1), LoRA()), "plain Precond"),
        (lambda: share(adapter(unet().denoiser, SMALL), SMALL), "plain Precond"),
        (lambda: share(edm(Normed(), (1, 4, 4)), SMALL), "keeps batch statistics"),
        (lambda: adapter(unet().denoiser, SMALL).describe(), "merged"),
        (lambda: roles_of(METHODS["SiD"], unet(), None, ("student",)), "need lora"),
        (lambda: roles_of(METHODS["SiD"], unet(), SMALL, ("critic",)), "unknown role for LoRA 'critic'"),
        (lambda: roles_of(METHODS["SiD"], unet(), SMALL, ("teacher",)), "choose one of fake, student"),
        (lambda: roles_of(METHODS["SiD"], unet(), SMALL, ()), "lora_roles are empty"),
        (lambda: save_lora(unet(), "nowhere"), "holds no LoRA"),
        (lambda: apply_lora(unet(), "nowhere"), "nowhere does not exist"),
    ],
)
def test_what_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


# ---- training


def test_a_run_leaves_the_merged_student_and_its_lora(tmp_path: Path) -> None:
    start = tiny()
    before = {k: v.clone() for k, v in start.denoiser.state_dict().items()}
    quick = Optim(lr=1e-2)
    method = SiD(student=quick, fake=quick, ema=Ema(rate=0.5))
    made = run("SiD", tmp_path, start=start, lora=SMALL, budget=4, method=method)
    assert differing(before, start.denoiser.state_dict()) == [], "the teacher is as it was"
    loaded = Generator.load(tmp_path)
    assert far(loaded.denoiser(X, 2.5, LABELS), made.denoiser(X, 2.5, LABELS)) == 0
    assert far(loaded.denoiser(X, 2.5, LABELS), start.denoiser(X, 2.5, LABELS)) > 1e-4
    assert loaded.card["lora"]["rank"] == 2 and loaded.card["lora"]["layers"] == 3
    again = apply_lora(tiny(), tmp_path / "lora")
    assert far(again.denoiser(X, 2.5, LABELS), made.denoiser(X, 2.5, LABELS)) < 1e-6
    checkpoint = load_tensors(Run(tmp_path).checkpoints()[-1] / "roles/student.safetensors")
    assert all(".lora_" in name for name in checkpoint)


def test_roles_that_are_not_listed_train_full_copies(tmp_path: Path) -> None:
    made = run("SiD", tmp_path, lora=SMALL, lora_roles=("fake",), budget=2)
    held = {n: load_tensors(Run(tmp_path).checkpoints()[-1] / f"roles/{n}.safetensors") for n in ("fake", "student")}
    assert all(".lora_" in n for n in held["fake"]) and held["student"].keys() == tiny().denoiser.state_dict().keys()
    assert type(made.denoiser) is Precond and not (tmp_path / "lora").exists() and "file" not in made.card["lora"]


def test_resume_is_bitwise_and_micro_batches_and_checkpointing_change_nothing(tmp_path: Path) -> None:
    straight = run("SiD", tmp_path / "a", lora=SMALL)
    with pytest.raises(Stop):
        run("SiD", tmp_path / "b", lora=SMALL, stop=4)
    # Checkpointing may be turned on when the memory runs out.
    run("SiD", tmp_path / "b", lora=SMALL, resume=True, checkpointing=True)
    assert differing(bits(tmp_path / "a"), bits(tmp_path / "b")) == []
    whole = run("SiD", tmp_path / "c", lora=SMALL, micro=1)
    assert far(whole.denoiser(X, 2.5, LABELS), straight.denoiser(X, 2.5, LABELS)) < 1e-5
    with pytest.raises(InputError, match=r"lora\.rank was 2 and is 3"):
        run("SiD", tmp_path / "a", lora=LoRA(rank=3, alpha=3), resume=True)


def ranked(out: Path, rank: int, port: int) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run("SiD", out, lora=SMALL, budget=3)


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = [child(ranked, (tmp_path / "two", rank, port)) for rank in range(2)]
    run("SiD", tmp_path / "one", lora=SMALL, budget=3)
    for process in children:
        process.join(60)
        assert process.exitcode == 0
    one, two = bits(tmp_path / "one"), bits(tmp_path / "two")
    # B grows from 0, so that rounding is seen beside little; in the weights it is beside them.
    for part, most in (("checkpoints/", 1e-3), ("student.safetensors", 1e-6)):
        found = furthest(*({k: v for k, v in t.items() if k.startswith(part)} for t in (one, two)))
        assert found[0] < most, found
    assert all(float(v.abs().max()) > 0 for k, v in one.items() if "roles/" in k and "lora_B" in k)
