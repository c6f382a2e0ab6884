"""Train a small convolutional network on real handwritten digits (scikit-learn's `load_digits`, 8 x 8 pixels).

python jobs/train_digits.py --workers 2
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys

import numpy as np
import torch
from torch import nn

from lepton_ray import Batch, DistributedTrainer

Split = tuple[np.ndarray, np.ndarray]


def load_digits() -> tuple[Split, Split]:
    """Return (images, labels) to train on, 80 %, and to test on; images scaled to 0..1, shape (samples, 1, 8, 8)."""
    try:
        from sklearn import datasets
    except ImportError:
        sys.exit("The digits come with scikit-learn, which is not installed. Run: pip install 'lepton-ray[examples]'")
    digits = datasets.load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = np.split(order, [len(order) * 4 // 5])
    return (images[train], labels[train]), (images[test], labels[test])


def make_model() -> nn.Module:
    """Build the network; also what the command printed at the end calls to load the trained weights."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def load_command(weights: str) -> str:
    """Return the shell command that loads the trained model, to be run in the repository's folder."""
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd() + os.sep) else sys.executable
    code = (
        "from jobs.train_digits import make_model; from safetensors.torch import load_file; "
        f"model = make_model(); model.load_state_dict(load_file({json.dumps(weights)})); print(model)"
    )
    return f"{shlex.quote(python)} -c {shlex.quote(code)}"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the data (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="samples per step, all workers (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sample order (default: %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--name", help="name of the run; the same name again goes on with it (default: a new one)")
    parser.add_argument("--storage", help="folder or URL for runs, reachable by all nodes (default: under your home)")
    return parser.parse_args()


def main() -> None:
    """Train, and say how good the model is and where to find it."""
    args = parse_args()
    lr = args.lr  # a plain value: of one that an object holds, a changed run would not be told
    train, test = load_digits()
    steps = args.epochs * -(-len(train[0]) // args.batch)
    torch.manual_seed(args.seed)
    result = DistributedTrainer(
        make_model(),
        train,
        test,
        num_workers=args.workers,
        loss="cross_entropy",
        metrics=["accuracy"],
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=lr),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps),
        batch=Batch(samples=args.batch),
        epochs=args.epochs,
        precision=args.precision,
        seed=args.seed,
        name=args.name,
        storage=args.storage,
    ).train()
    print(f"\nTest accuracy: {result.metrics['test_accuracy']:.4f}")
    print(f"Run folder:    {result.path}")
    print(f"Load the model, in this folder:\n  {load_command(f'{result.path}/model.safetensors')}")


if __name__ == "__main__":
    main()
