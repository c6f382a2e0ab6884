"""Number formats of a step: autocast, and loss scaling for fp16 that all workers agree on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which forwards run in `precision` ("fp32": as the model is)."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])


@dataclass(slots=True)
class Scaler:
    """The loss scale of fp16. Every worker sees the same reduced gradients, so every copy of it stays the same.

    Source: the dynamic loss scaling of mixed precision training (Micikevicius et al., 2018), constants as in torch.
    """

    scale: float = 2.0**16
    good_steps: int = 0
    growth_interval: int = 2000

    def update(self, is_finite: bool) -> None:
        """Halve the scale after an overflow; double it after `growth_interval` steps without one."""
        if not is_finite:
            self.scale, self.good_steps = max(self.scale / 2, 1.0), 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0
