"""Keyed noise: the same for any batch, process and order, different for different keys, and distributed as it says."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fewstep import Noise

GAMMA = 0x9E3779B97F4A7C15
WORD = (1 << 64) - 1
seeds = st.integers(-(2**70), 2**70)


def mix(z: int) -> int:
    """The finaliser of splitmix64 on Python's integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def unsigned(bits: Tensor) -> list[int]:
    return [b & WORD for b in bits.flatten().tolist()]


def largest_correlation(rows: Tensor) -> float:
    """The largest correlation in size between two different rows."""
    off = torch.corrcoef(rows.double()) - torch.eye(len(rows), dtype=torch.float64)
    return float(off.abs().max())


# ---- a function of seed, sample and key alone


@settings(max_examples=30, deadline=None)
@given(seed=seeds, cut=st.integers(1, 11), step=st.integers(0, 2**40))
def test_any_split_order_or_subset_gives_the_same(seed: int, cut: int, step: int) -> None:
    whole = Noise.of(seed, 12)
    wanted = whole.normal((3, 5), step, "churn")
    parts = [Noise.of(seed, torch.arange(i, min(i + cut, 12))).normal((3, 5), step, "churn") for i in range(0, 12, cut)]
    assert torch.equal(torch.cat(parts), wanted)
    order = torch.tensor([7, 0, 11, 3])
    assert torch.equal(Noise.of(seed, order).normal((3, 5), step, "churn"), wanted[order])
    assert torch.equal(whole[order].normal((3, 5), step, "churn"), wanted[order])
    assert torch.equal(whole[cut:].uniform((2,), "u"), whole.uniform((2,), "u")[cut:])
    assert torch.equal(whole.fold("a", 1)[order].bits(4, "b"), whole.bits(4, "a", 1, "b")[order])


def test_nothing_global_is_read_or_moved() -> None:
    torch.manual_seed(0)
    first = Noise.of(1, 4).normal((8,), "x")
    after = torch.rand(1)
    torch.manual_seed(123)
    assert torch.equal(Noise.of(1, 4).normal((8,), "x"), first)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_a_list_of_seeds_gives_each_sample_its_own(seed: int) -> None:
    alone = Noise.of(seed, 1).normal((6,), "start")
    assert torch.equal(Noise.of([seed], 1).normal((6,), "start"), alone)
    assert torch.equal(Noise.of([seed + 1, seed, seed + 2], 3).normal((6,), "start")[1:2], alone)


def test_everything_in_the_key_counts() -> None:
    keys = [
        (7, 0, ()),
        (8, 0, ()),
        (-7, 0, ()),
        (7, 1, ()),
        (7, 2**33, ()),
        (7, 0, (0,)),
        (7, 0, (1,)),
        (7, 0, (-1,)),
        (7, 0, ("0",)),
        (7, 0, ("1",)),
        (7, 0, ("",)),
        (7, 0, ("a", "b")),
        (7, 0, ("b", "a")),
        (7, 0, ("ab",)),
        (7, 0, ("a", "b", 0)),
        (7, 0, (0, 1)),
        (7, 0, (1, 0)),
        (7 + 2**32, 0, ()),
    ]
    rows = torch.cat([Noise.of(seed, torch.tensor([i])).bits(64, *key) for seed, i, key in keys])
    assert len(set(rows.flatten().tolist())) == rows.numel()
    normal = torch.cat([Noise.of(seed, torch.tensor([i])).normal((4096,), *key) for seed, i, key in keys])
    assert largest_correlation(normal) < 5 / math.sqrt(4096)


def test_the_bits_are_splitmix64() -> None:
    # The generator's published first output for the state 0.
    assert mix(GAMMA) == 0xE220A8397B1DCDAF
    assert mix((2 * GAMMA) & WORD) == 0x6E789E6AA1B965F4
    sources = Noise(torch.tensor([0, 5, -3]))
    for state, row in zip((0, 5, -3), sources.bits(5), strict=True):
        assert unsigned(row) == [mix((state + i * GAMMA) & WORD) for i in range(1, 6)]


def test_seeds_and_keys_are_what_files_were_made_with() -> None:
    """Pinned: a change here changes every picture that anyone has a seed of."""

    def word(part: int) -> int:
        return (part * 0x2545F4914F6CDD1D + 1) & WORD

    for seed in (0, 7, -1, 2**63):
        wanted = [mix((mix(word(seed)) + i * GAMMA) & WORD) for i in range(3)]
        assert unsigned(Noise.of(seed, 3).seeds) == wanted
        folded = [mix((s + mix(word(12)) * GAMMA) & WORD) for s in wanted]
        assert unsigned(Noise.of(seed, 3).fold(12).seeds) == folded
    assert unsigned(Noise.of(7, 1).bits(2, "start")) == [5598346696565485988, 5389955873378031568]


CHILD = """
import json, torch
from fewstep import Noise
n = Noise.of(11, 3)
print(json.dumps([n.bits(3, "start", 4).tolist(), n.normal((2,), "x").double().tolist(), hash("start")]))
"""


def test_every_process_draws_the_same() -> None:
    runs = []
    for salt in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": salt}
        done = subprocess.run(
            [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, env=environment
        )
        runs.append(json.loads(done.stdout))
    assert runs[0][2] != runs[1][2]
    here = Noise.of(11, 3)
    for bits, normal, _ in runs:
        assert bits == here.bits(3, "start", 4).tolist()
        assert normal == here.normal((2,), "x").double().tolist()


# ---- distributions


def test_uniform() -> None:
    x = Noise.of(3, 100).uniform((2000,), "u", dtype=torch.float64).flatten()
    assert float(x.min()) >= 0
    assert float(x.max()) < 1
    assert stats.kstest(x.numpy(), "uniform").pvalue > 0.001
    for power in range(1, 5):
        spread = math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        assert abs(float((x**power).mean()) - 1 / (power + 1)) < 5 * spread / math.sqrt(len(x))
    assert float(Noise.of(3, 1000).uniform((500,), "u").max()) < 1


def test_normal() -> None:
    x = Noise.of(3, 500).normal((2001,), "n", dtype=torch.float64)
    flat = x.flatten()
    assert stats.kstest(flat.numpy(), "norm").pvalue > 0.001
    for power, moment, fourth in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((flat**power).mean()) - moment) < 5 * math.sqrt(fourth / len(flat))
    beyond = int((flat.abs() > 4).sum())
    assert 30 <= beyond <= 100, "63.4 are expected"
    # The two numbers of one word are independent, and so are their squares.
    pairs = x[:, :2000].reshape(-1, 2)
    assert largest_correlation(pairs.T) < 5 / math.sqrt(len(pairs))
    assert largest_correlation((pairs**2).T) < 5 / math.sqrt(len(pairs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_shapes(dtype: torch.dtype) -> None:
    noise = Noise.of(3, 4)
    for shape in ((), (1,), (3,), (2, 3, 5)):
        normal, uniform = noise.normal(shape, "a", dtype=dtype), noise.uniform(shape, "a", dtype=dtype)
        assert normal.shape == uniform.shape == (4, *shape)
        assert normal.dtype == uniform.dtype == dtype
        wide = noise.normal(shape, "a", dtype=torch.float64)
        assert float((normal.double() - wide).abs().max()) < 1e-6
    assert len(noise) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_uniforms_stay_below_one(dtype: torch.dtype) -> None:
    x = Noise.of(3, 200).uniform((2000,), "u", dtype=dtype)
    assert x.dtype == dtype
    assert float(x.min()) >= 0
    assert 0.99 < float(x.max()) < 1
    assert abs(float(x.double().mean()) - 0.5) < 0.005


def test_neighbours_are_independent() -> None:
    size = 8192
    seeds_apart = torch.cat([Noise.of(s, 1).normal((size,)) for s in range(40)])
    ids_apart = Noise.of(0, 40).normal((size,))
    steps_apart = torch.cat([Noise.of(0, 1).normal((size,), step) for step in range(40)])
    everything = torch.cat([seeds_apart[1:], ids_apart[1:], steps_apart])
    assert largest_correlation(everything) < 5 / math.sqrt(size)
    x = Noise.of(0, 1).normal((200_000,))[0].double()
    for lag in (1, 2, 3, 4, 8, 16):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < 5 / math.sqrt(len(x))


@pytest.mark.parametrize(("low", "high"), [(0, 2), (0, 3), (-5, 2), (10, 1010)])
def test_integers_are_in_range_and_even(low: int, high: int) -> None:
    x = Noise.of(3, 200).integers(low, high, (500,), "i")
    assert x.dtype == torch.int64
    assert x.shape == (200, 500)
    counts = torch.bincount((x - low).flatten(), minlength=high - low)
    assert len(counts) == high - low
    assert int(x.min()) >= low
    assert stats.chisquare(counts.numpy()).pvalue > 0.001


def test_large_ranges_of_integers_stay_in_range() -> None:
    x = Noise.of(3, 10).integers(0, 2**40, (100,), "i")
    assert int(x.min()) >= 0
    assert 2**39 < int(x.max()) < 2**40
    assert (Noise.of(3, 10).integers(4, 5, (100,), "i") == 4).all()
