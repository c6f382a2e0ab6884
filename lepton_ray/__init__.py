"""lepton_ray: distributed deep learning on Ray.

Names are imported when they are first used, so that `import lepton_ray` loads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton_ray.callbacks import Callback as Callback
    from lepton_ray.callbacks import EarlyStopping as EarlyStopping
    from lepton_ray.callbacks import TensorBoard as TensorBoard
    from lepton_ray.config import Batch as Batch
    from lepton_ray.config import Checkpoints as Checkpoints
    from lepton_ray.config import Elastic as Elastic
    from lepton_ray.config import Faults as Faults
    from lepton_ray.config import OuterSGD as OuterSGD
    from lepton_ray.config import Parallel as Parallel
    from lepton_ray.config import Resources as Resources
    from lepton_ray.config import Sync as Sync
    from lepton_ray.errors import CheckpointError as CheckpointError
    from lepton_ray.errors import ConfigError as ConfigError
    from lepton_ray.errors import LeptonError as LeptonError
    from lepton_ray.errors import PeerLost as PeerLost
    from lepton_ray.errors import RunCancelled as RunCancelled
    from lepton_ray.errors import RunFailed as RunFailed
    from lepton_ray.errors import WaitTimeout as WaitTimeout
    from lepton_ray.errors import WorkerFailed as WorkerFailed
    from lepton_ray.job import Job as Job
    from lepton_ray.job import attach as attach
    from lepton_ray.result import Result as Result
    from lepton_ray.train.words import PerEpoch as PerEpoch
    from lepton_ray.trainer import DistributedTrainer as DistributedTrainer

__version__ = "0.1.0"

_HOMES = {
    "callbacks": ("Callback", "EarlyStopping", "TensorBoard"),
    "config": ("Batch", "Checkpoints", "Elastic", "Faults", "OuterSGD", "Parallel", "Resources", "Sync"),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "LeptonError",
        "PeerLost",
        "RunCancelled",
        "RunFailed",
        "WaitTimeout",
        "WorkerFailed",
    ),
    "job": ("Job", "attach"),
    "result": ("Result",),
    "train.words": ("PerEpoch",),
    "trainer": ("DistributedTrainer",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lepton_ray' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lepton_ray.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
