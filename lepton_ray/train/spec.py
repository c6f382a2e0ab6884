"""What travels from the driver to the workers of a job: values only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lepton_ray.config import Batch, Checkpoints, Sync
from lepton_ray.train.blueprint import Blueprint
from lepton_ray.train.words import Inferred, TargetFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """The user's own pieces, pickled together (they may share closures)."""

    loss: Any = None
    optimizer: Any = None
    scheduler: Any = None
    metrics: Any = None
    step_fn: Any = None
    callbacks: Sequence[Any] = ()
    inferred: Inferred | None = None
    """Loss and metrics of a torch model that came without a loss."""
    target: TargetFacts | None = None
    """What the targets look like, from which the loss of a Keras model follows that came without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """A job as its workers need it."""

    name: str
    run_url: str
    mode: Literal["train", "evaluate", "predict"] = "train"
    blueprint: Blueprint
    code: bytes
    """A pickled `Code`."""
    batch: Batch
    """With its microbatches filled in."""
    epochs: int | None
    steps: int | None
    precision: str
    seed: int
    reproducible: bool
    checkpoints: Checkpoints
    validate_every: int | None
    """Steps between evaluations on the test data. None: at the end of each epoch."""
    threads: int
    """torch threads of one worker."""
    sync: Sync = Sync()
    patience_s: float = 60
    """How long the workers wait for one of them that makes no progress."""
    size: int = 1
    """Workers of a replica. Each trains a part of the model that needs nothing of the others; all commit together."""
    coordinate: int = 0
    """Which of them this worker is."""
