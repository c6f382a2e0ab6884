"""After local steps each worker holds what no other does: write it beside the checkpoint of rank 0, and tell that one.

Unlike rank 0's own part, these files are written while training waits. Nobody may be ahead of the checkpoint that
names them, and it may not be named before all are there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from lepton_ray.storage import Folder
from lepton_ray.train.ballot import vote
from lepton_ray.train.checkpoint_format import File, write_own
from lepton_ray.train.peers import Peers

log = logging.getLogger(__name__)

_WORDS = 8
"""A SHA-256 travels as so many numbers of 32 bits, which a float64 holds exactly."""


def write_files(
    folder: Folder, step: int, state: Callable[[], Any], peers: Peers, *, is_ready: bool
) -> list[File] | None:
    """Let every worker but that of rank 0 write its own state into the folder of a step; all call this together.

    folder: that of the checkpoints. is_ready: rank 0 is not writing or deleting there any more.
    Returns the files, or None when there is one that could not be written.
    """
    if vote(peers, [not is_ready])[0] > 0:
        return None
    rows = torch.zeros(peers.world, 2 + _WORDS, dtype=torch.float64)
    if peers.rank > 0:
        try:
            rows[peers.rank] = _row(write_own(folder, step, peers.rank, state()))
        except Exception as error:  # noqa: BLE001 - each storage has errors of its own; training goes on
            log.warning("Rank %s could not write its state of step %s (%s).", peers.rank, step, error)
    peers.allreduce(rows)
    files = [_file(rank, row.tolist()) for rank, row in enumerate(rows) if rank > 0]
    return files if all(file.size_bytes for file in files) else None


def _row(file: File) -> torch.Tensor:
    number = int(file.name.rpartition("-")[2].partition(".")[0])
    words = [int(file.sha256[8 * word : 8 * word + 8], 16) for word in range(_WORDS)]
    return torch.tensor([number, file.size_bytes, *words], dtype=torch.float64)


def _file(rank: int, row: list[float]) -> File:
    number, size_bytes, *words = map(int, row)
    digest = "".join(f"{word:08x}" for word in words)
    return File(name=f"worker-{rank}-{number}.safetensors", size_bytes=size_bytes, sha256=digest)
