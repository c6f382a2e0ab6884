"""What all workers of a run hold alike beside model and optimizer: how far it is, and what is to be done next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any


class Kind(str, Enum):
    """Kinds of transactions."""

    STEP = "step"
    VALIDATE = "validate"
    EPOCH = "epoch"
    SETTLE = "settle"
    """Only a ballot: what was committed before is stable after it."""
    TELL = "tell"
    """The others take over what the callbacks of rank 0 remember."""
    SAVE = "save"
    MIRROR = "mirror"
    FINALIZE = "finalize"
    """The weights that a run ends with take their place."""
    COMPARE = "compare"
    """All workers hold the same model."""
    END = "end"


@dataclass(slots=True, kw_only=True)
class TrainState:
    """The same on every worker after the same number of transactions."""

    committed: int = 0
    """Transactions done."""
    step: int = 0
    """Steps done."""
    epoch: int = 0
    loss_sum: float = 0.0
    """Of this epoch's steps."""
    weight: float = 0.0
    """What it is to be divided by."""
    tested: dict[str, float] = field(default_factory=dict)
    """What was measured on the test data in this epoch."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last of each."""
    measured: dict[str, float] = field(default_factory=dict)
    """What was measured of the weights as they are now."""
    validated_step: int = -1
    todo: list[Kind] = field(default_factory=list)
    """Transactions that come before the next step."""
    is_stopping: bool = False
    """All agreed to stop."""
    is_done: bool = False
    """A callback has asked for that: the run is complete."""
    digest: str = ""
    """Of the weights that all were found to hold at the end."""
    kind: str = ""
    """What all workers run on, where another kind would give other bits."""
    untold: int = 0
    """Bytes that the callbacks of rank 0 remember, and the others do not know."""

    @property
    def loss(self) -> float:
        """Return the mean training loss of this epoch."""
        return self.loss_sum / self.weight if self.weight else 0.0

    def note(self, found: Mapping[str, float]) -> None:
        """Take in what was measured at this step."""
        self.measured |= found
        self.metrics |= found

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "todo": [kind.value for kind in self.todo]}

    def load(self, plain: Mapping[str, Any]) -> None:
        """Take over what `plain` returned."""
        for each in fields(self):
            setattr(self, each.name, plain[each.name])
        self.todo = [Kind(kind) for kind in plain["todo"]]
        self.metrics, self.measured, self.tested = dict(self.metrics), dict(self.measured), dict(self.tested)
