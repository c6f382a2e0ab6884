"""Train a byte-level transformer language model on the help pages that every Python carries, or on a file.

python jobs/train_text.py --workers 2 --data book.txt

Dims: B samples, L positions, D features, V byte values, H heads.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lepton_ray import Batch, DistributedTrainer

CONTEXT = 64
BYTE_VALUES = 256


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each normalised before and added to its input."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * features)
        self.project = nn.Linear(features, features)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(features), nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features)
        )

    def forward(self, input_BLD: torch.Tensor) -> torch.Tensor:
        """Map features to features of the same shape."""
        qkv_3BHLD = self.qkv(self.attention_norm(input_BLD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed_BHLD = F.scaled_dot_product_attention(*qkv_3BHLD, is_causal=True)
        hidden_BLD = input_BLD + self.project(mixed_BHLD.transpose(1, 2).flatten(2))
        return hidden_BLD + self.feed_forward(hidden_BLD)


class ByteModel(nn.Module):
    """Predict the next byte at every position."""

    def __init__(self, features: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTE_VALUES, features)
        self.positions = nn.Parameter(torch.zeros(CONTEXT, features))
        self.blocks = nn.Sequential(*(Block(features, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, BYTE_VALUES)
        nn.init.normal_(self.bytes.weight, std=0.02)

    def forward(self, bytes_BL: torch.Tensor) -> torch.Tensor:
        """Return logits_BLV."""
        embedded_BLD = self.bytes(bytes_BL.long()) + self.positions[: bytes_BL.shape[1]]
        return self.head(self.norm(self.blocks(embedded_BLD)))


def loss(logits_BLV: torch.Tensor, targets_BL: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sum over all bytes, in nats, and their number: the mean is then exact over any number of workers."""
    sum_nats = F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten().long(), reduction="sum")
    return sum_nats, targets_BL.numel()


def read_text(path: Path | None) -> bytes:
    """Return the file's bytes; without a file, the text of Python's `help()` topics."""
    if path is not None:
        return path.read_bytes()
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values()).encode()


def windows(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Cut the text into (input_BL, target_BL) of dtype uint8; a target is the byte after its input."""
    rows = (len(text) - 1) // CONTEXT
    if rows < 2:
        raise SystemExit(f"The text has {len(text)} bytes; {2 * CONTEXT + 1} are needed at least.")
    stream = np.frombuffer(text, dtype=np.uint8)
    cut = rows * CONTEXT
    return stream[:cut].reshape(rows, CONTEXT), stream[1 : cut + 1].reshape(rows, CONTEXT)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="a text file (default: the pages behind Python's help())")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the data (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="stop after so many steps; replaces --epochs")
    parser.add_argument("--batch", type=int, default=32, help="windows per step, all workers (default: %(default)s)")
    parser.add_argument("--features", type=int, default=96, help="width of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sample order (default: %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--name", help="name of the run; the same name again goes on with it (default: a new one)")
    parser.add_argument("--storage", help="folder or URL for runs, reachable by all nodes (default: under your home)")
    return parser.parse_args()


def main() -> None:
    """Train, and say how many bits the model needs for a byte that it has not seen."""
    args = parse_args()
    lr = args.lr  # a plain value: of one that an object holds, a changed run would not be told
    inputs, targets = windows(read_text(args.data))
    order = np.random.default_rng(0).permutation(len(inputs))
    test, train = np.split(order, [max(1, len(order) // 20)])
    steps = args.steps or args.epochs * -(-len(train) // args.batch)
    torch.manual_seed(args.seed)
    result = DistributedTrainer(
        ByteModel(args.features, args.layers),
        (inputs[train], targets[train]),
        (inputs[test], targets[test]),
        num_workers=args.workers,
        loss=loss,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=lr),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps),
        batch=Batch(samples=args.batch, clip_norm=1.0),
        epochs=None if args.steps else args.epochs,
        steps=args.steps,
        precision=args.precision,
        seed=args.seed,
        name=args.name,
        storage=args.storage,
    ).train()
    print(f"\nTest loss:  {result.metrics['test_loss'] / math.log(2):.3f} bits per byte")
    print(f"Run folder: {result.path}")


if __name__ == "__main__":
    main()
