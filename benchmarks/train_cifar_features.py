"""Trains a packaged network for CIFAR-10 (fewstep/measure/weights/cifar10-8.safetensors and cifar10-32.safetensors).

Data: the Parquet files of CIFAR-10, 50,000 pictures to train and 10,000 to test; at 8 pixels averaged over areas.
Training: AdamW, one-cycle learning rate, flips and shifts, all seeds fixed; at 32 pixels the first half of the epochs
sees pictures of 16. The test pictures choose nothing: the last weights are the ones that are written, in half
precision, and the accuracy is that of the rounded weights.

    python benchmarks/train_cifar_features.py --train train.parquet --test test.parquet --side 8 --epochs 10
    python benchmarks/train_cifar_features.py --train train.parquet --test test.parquet --side 32 --epochs 14
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.state import save_tensors
from fewstep.data import load_data
from fewstep.measure.cifar import LAYOUTS, CifarNet, cifar_weights

BATCH = 125


def loaded(path: Path, side: int) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, side, side) in [-1, 1] and labels (N,)."""
    data = load_data(str(path), resize=None if side == 32 else side)
    parts = [data.take(ids) for ids in torch.arange(len(data)).split(5000)]
    return torch.cat([part.x for part in parts if part.x is not None]), torch.cat([p.cond["label"] for p in parts])


def changed(images: Tensor, draw: torch.Generator) -> Tensor:
    """Every picture flipped or not, and moved by up to a sixteenth of its side (at least a pixel) in each direction."""
    side = images.shape[-1]
    most = max(1, side // 16)
    flip = torch.rand(len(images), generator=draw) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (most,) * 4, mode="replicate")
    offset = torch.randint(2 * most + 1, (2, len(images), 1), generator=draw)
    rows, columns = offset + torch.arange(side)
    which = torch.arange(len(images))[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> CifarNet:
    """The network after ``epochs`` passes; the same for the same seed and torch version."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    net = CifarNet(images.shape[-1]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for epoch in range(epochs):
        order, total = torch.randperm(len(images), generator=draw), 0.0
        for pick in order[: len(order) // BATCH * BATCH].split(BATCH):
            inputs = changed(images[pick], draw)
            if net.side == 32 and 2 * epoch < epochs:
                # The network is convolutional up to its pooling, and learns most of it at a quarter of the cost.
                inputs = F.avg_pool2d(inputs, 2)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(net.logits(inputs), labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * BATCH / len(images)
        print(f"epoch {epoch + 1}: loss {total:.3f}, {time.process_time():.0f} CPU-seconds", flush=True)
    return net.eval()


def main() -> None:
    """Trains, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--side", type=int, choices=tuple(LAYOUTS), required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = loaded(options.train, options.side)
    start = time.process_time()
    net = train(images, labels, epochs=options.epochs, seed=options.seed).half().float()
    seconds = time.process_time() - start
    held_out, held_out_labels = loaded(options.test, options.side)
    with torch.no_grad():
        seen = torch.cat([net.logits(part).argmax(1) for part in held_out.split(500)])
    accuracy = (seen == held_out_labels).float().mean().item()
    metadata = {
        "test_accuracy": f"{accuracy:.4f}",
        "pictures": f"{len(images)} to train, {len(held_out)} to test",
        "train_sha256": hashlib.sha256(options.train.read_bytes()).hexdigest(),
        "test_sha256": hashlib.sha256(options.test.read_bytes()).hexdigest(),
        "side": str(options.side),
        "scaling": "pixels / 127.5 - 1",
        "seed": str(options.seed),
        "epochs": str(options.epochs),
        "script": "benchmarks/train_cifar_features.py",
    }
    out = options.out or cifar_weights(options.side)
    save_tensors(out, {name: value.half() for name, value in net.state_dict().items()}, metadata)
    print(f"test accuracy {accuracy:.4f}; {seconds:.0f} CPU-seconds; {out.stat().st_size} bytes in {out}")


if __name__ == "__main__":
    main()
