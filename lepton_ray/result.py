"""What a run leaves: its metrics, history, model, checkpoint and receipt, read from its folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lepton_ray.errors import ConfigError
from lepton_ray.plan.receipt import Receipt, receipt
from lepton_ray.storage import Folder

if TYPE_CHECKING:
    from ray.train import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The outcome of a finished run."""

    name: str
    path: str
    """The run's folder: journal, checkpoints, logs and model.safetensors."""
    metrics: dict[str, float]
    """The last of each, for example train_loss, test_loss, test_accuracy."""
    history: list[dict[str, float]]
    """One record per epoch."""
    receipt: Receipt
    """Steps, samples, samples lost and repeated, and the digest of the weights."""
    _model: Any = field(default=None, repr=False)

    def model(self, model: Any = None) -> Any:
        """Return one plain trained model: the object that was handed to the trainer, or `model`, with its weights.

        model: an untrained one of the same architecture; needed where the trainer got a factory in another process.
        """
        from lepton_ray.train.blueprint import restore_into
        from lepton_ray.train.weights import read_weights

        target = self._model if model is None else model
        if target is None:
            raise ConfigError(
                f"this process has no model to put the weights of {self.name!r} into. Pass one: result.model(Net())."
            )
        if not hasattr(target, "state_dict") and not hasattr(target, "set_weights"):
            target = target()
        restore_into(target, read_weights(Folder(self.path)))
        return target

    @property
    def checkpoint(self) -> Checkpoint:
        """The newest valid checkpoint, as Ray Train's class (a folder of safetensors files and a JSON manifest)."""
        from ray.train import Checkpoint

        from lepton_ray.train.checkpoint_format import newest, step_folder

        folder = Folder(self.path).sub("checkpoints")
        found, problems = newest(folder)
        if found is None:
            raise ConfigError(f"no valid checkpoint in {folder.url}. {' '.join(problems)}")
        return Checkpoint(step_folder(folder, found.step).url)


def make_result(name: str, path: str, records: Iterable[Mapping[str, Any]], model: Any = None) -> Result:
    """Build the result from a run's journal."""
    records = list(records)
    history: dict[int, dict[str, float]] = {}
    metrics: dict[str, float] = {}
    for record in records:
        match record["event"]:
            case "epoch":
                # A later life does an epoch again when no checkpoint stood at its end.
                history[record["epoch"]] = {k: v for k, v in record.items() if k not in ("t", "event", "generation")}
            case "trained":
                metrics = dict(record["metrics"])
    return Result(
        name=name,
        path=path,
        metrics=metrics,
        history=[history[epoch] for epoch in sorted(history)],
        receipt=receipt(records),
        _model=model,
    )
