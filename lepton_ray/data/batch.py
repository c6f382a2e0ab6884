"""Take batches apart and put them together again.

A batch is a tensor, or a (nested) tuple, list or dict of tensors with samples along the first dim. Other leaves, such
as strings that a Dataset passes along, are carried and never looked at. Works on any leaf, so torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from lepton_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch

Batch: TypeAlias = Any  # a recursive type would reject the user's own namedtuples and mappings

TARGET_KEYS = ("y", "label", "labels", "target", "targets")


def tree_map(fn: Callable[[Any], Any], batch: Batch) -> Batch:
    """Apply `fn` to every leaf, keeping the structure; any mapping becomes a dict."""
    if isinstance(batch, Mapping):
        return {key: tree_map(fn, value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [tree_map(fn, value) for value in batch]
        if hasattr(batch, "_fields"):
            return type(batch)(*parts)
        return tuple(parts) if isinstance(batch, tuple) else parts
    return fn(batch)


def samples(batch: Batch) -> int:
    """Count the samples: the first dim, which all leaves that have one must share. Raises ConfigError."""
    counts: set[int] = set()

    def note(leaf: Any) -> None:
        if getattr(leaf, "shape", ()):
            counts.add(int(leaf.shape[0]))

    tree_map(note, batch)
    if len(counts) != 1:
        found = f"first dims {sorted(counts)}" if counts else "no tensor with a first dim"
        raise ConfigError(f"The tensors of a batch must have one sample per row: expected one, found {found}.")
    return counts.pop()


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Move every tensor to `device`; tensors that are there already are not copied."""
    return tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, batch)


def aligned(batch: Batch) -> Batch:
    """Copy every tensor to where torch's own lie, unless it does: kernels may add in another order elsewhere."""
    return tree_map(lambda leaf: leaf.clone() if hasattr(leaf, "data_ptr") and leaf.data_ptr() % 64 else leaf, batch)


def split_target(batch: Batch) -> tuple[Batch, Batch]:
    """Separate what the model is given from what it should answer.

    (x, y) -> x, y. A longer tuple -> all but the last, the last. A dict -> the rest, the first of TARGET_KEYS in it; a
    rest of one entry is that entry. A tensor, or a tuple of one -> the tensor, None.
    Raises ConfigError for a dict without such a key.
    """
    if isinstance(batch, Mapping):
        target = next((key for key in TARGET_KEYS if key in batch), None)
        if target is None or len(batch) == 1:
            raise ConfigError(
                f"A batch that is a dict needs its target under one of {', '.join(TARGET_KEYS)} beside its inputs; "
                f"found the keys {', '.join(map(str, batch)) or '(none)'}. Rename one, for example with transform=."
            )
        rest = {key: value for key, value in batch.items() if key != target}
        return (next(iter(rest.values())) if len(rest) == 1 else rest), batch[target]
    if isinstance(batch, (tuple, list)):
        if len(batch) == 1:
            return batch[0], None
        *inputs, target = batch
        return (inputs[0] if len(inputs) == 1 else tuple(inputs)), target
    return batch, None
