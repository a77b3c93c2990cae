"""Trains the packaged digits network (fewstep/measure/weights/digits.safetensors) and states its held-out accuracy.

Data: scikit-learn's 1797 digits, pixels / 8 - 1, stratified split into 1437 to train and 360 held out (split seed 0).
Training: AdamW, one-cycle learning rate, shifts by at most one pixel, all seeds fixed; under a minute on one core.
The held-out digits choose nothing: the last weights are the ones that are written.

    python benchmarks/train_digits_features.py [--out FILE] [--seed 0] [--epochs 40]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from fewstep.measure.features import WEIGHTS, DigitsNet

BATCH = 64


def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures (1437, 1, 8, 8) and labels to train, then pictures (360, 1, 8, 8) and labels held out."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, held_out = train_test_split(torch.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    return images[train], labels[train], images[held_out], labels[held_out]


def shift(images: Tensor, draw: torch.Generator) -> Tensor:
    """Every picture moved by -1, 0 or 1 pixels in each direction; the background (-1) moves in."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1)
    offset = torch.randint(3, (2, len(images), 1), generator=draw)
    rows = offset[0] + torch.arange(8)
    columns = offset[1] + torch.arange(8)
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def train(images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> DigitsNet:
    """The network after ``epochs`` passes; the same for the same seed and torch version."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    net = DigitsNet()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=draw)
        for pick in order[: len(order) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(net.logits(shift(images[pick], draw)), labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def main() -> None:
    """Trains, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, labels, held_out, held_out_labels = split()
    start = time.perf_counter()
    net = train(images, labels, epochs=options.epochs, seed=options.seed)
    with torch.no_grad():
        accuracy = (net.logits(held_out).argmax(1) == held_out_labels).float().mean().item()
    metadata = {
        "held_out_accuracy": f"{accuracy:.4f}",
        "split": "sklearn.load_digits, train_test_split(arange(1797), test_size=360, random_state=0, stratify=target)",
        "scaling": "pixels / 8 - 1",
        "seed": str(options.seed),
        "epochs": str(options.epochs),
        "script": "benchmarks/train_digits_features.py",
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, options.out, metadata)
    size, seconds = options.out.stat().st_size, time.perf_counter() - start
    print(f"held-out accuracy {accuracy:.4f} on {len(held_out)} digits; {seconds:.0f} s; {size} bytes in {options.out}")


if __name__ == "__main__":
    main()
