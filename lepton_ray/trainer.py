"""The front door: `DistributedTrainer(model=..., train_data=(x, y), num_workers=4).train()`."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from lepton_ray import journal
from lepton_ray.callbacks import Callback
from lepton_ray.config import Batch, Checkpoints, Elastic, Faults, Parallel, Precision, Resources, Sync
from lepton_ray.data.sources import Source, Stream, make_source, spare_cpus
from lepton_ray.errors import ConfigError
from lepton_ray.job import Job
from lepton_ray.plan.types import Slot
from lepton_ray.prepare import Options, Prepared, difference, prepare, with_place
from lepton_ray.progress import say
from lepton_ray.result import Result
from lepton_ray.storage import Folder

DEFAULT_STORAGE = "~/lepton_ray"


class DistributedTrainer:
    """Trains a model on several workers of a Ray cluster.

    model: an `nn.Module`, a Keras model, or a function without arguments that makes one (for big models: it is called
        in the workers).
    train_data, test_data: `(x, y)` of numpy arrays or torch tensors, a torch `Dataset`, a `ray.data.Dataset`, or the
        path (or glob) of Parquet files.
    num_workers: processes that train together, each with `resources`. `Elastic(min=2, max=8)`, or (2, 8): as many of
        them as there is room for.
    loss, optimizer, metrics: words ("cross_entropy", "adam", "accuracy", ...) or callables. Without a loss it is
        inferred from the data, or taken from a compiled Keras model. An optimizer callable gets the model, a loss and
        a metric get (outputs, target) and return a mean or (sum, weight).
    scheduler: a function of the optimizer that returns a torch LR scheduler, stepped once per step (`PerEpoch` of
        one: once per epoch).
    epochs or steps: how long to train; one epoch by default.
    batch: samples of one step over all workers, or a `Batch`.
    precision: "fp32", "bf16" or "fp16".
    seed: decides sample order, dropout and everything else that is random; the number of workers does not.
    reproducible: the same bits of the weights for any number of workers and any history of them, for the same
        `Batch(microbatches=...)`, kind of device and versions; deterministic kernels only.
    name: of the run. The same name again attaches to it, returns its result, or goes on from its last checkpoint.
    storage: an absolute path or fsspec URL that every node can write; ~/lepton_ray on a single machine.
    resources, faults, parallel: what a worker asks of Ray, how patient the run is, how a copy of the model is laid out.
    checkpoints: when the training state is written, and what is kept.
    validate_every: steps between evaluations on test_data; at the end of each epoch by default.
    sync: when the workers add up what they learnt: in every step, or after `Sync.local(steps=...)`.
    callbacks: objects of classes derived from `Callback`; their hooks run in the process of rank 0.
    transform, collate: a callable on each batch, and on the samples of a Dataset.
    step_fn: `step_fn(model, batch, optimizers) -> loss or dict` in place of the usual step.

    Raises ConfigError for whatever can be known to be wrong before anything starts.
    """

    def __init__(
        self,
        model: Any,
        train_data: Any,
        test_data: Any = None,
        *,
        num_workers: int | tuple[int, int] | Elastic = 1,
        loss: str | Callable[..., Any] | None = None,
        optimizer: str | Callable[..., Any] | None = None,
        scheduler: Callable[..., Any] | None = None,
        metrics: str | Sequence[Any] | Mapping[str, Any] | Callable[..., Any] | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        batch: int | Batch = Batch(),
        precision: Precision = "fp32",
        seed: int = 0,
        reproducible: bool = False,
        name: str | None = None,
        storage: str | os.PathLike[str] | None = None,
        resources: Resources = Resources(),
        faults: Faults = Faults(),
        parallel: Parallel = Parallel(),
        checkpoints: Checkpoints = Checkpoints(),
        validate_every: int | None = None,
        callbacks: Sequence[Callback] = (),
        transform: Callable[[Any], Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        step_fn: Callable[..., Any] | None = None,
        sync: Sync = Sync(),
    ) -> None:
        for label, value, kind in (
            ("resources", resources, Resources),
            ("faults", faults, Faults),
            ("parallel", parallel, Parallel),
            ("checkpoints", checkpoints, Checkpoints),
            ("sync", sync, Sync),
        ):
            if not isinstance(value, kind):
                raise ConfigError(f"{label}={value!r}: expected a {kind.__name__}(...).")
        if not isinstance(callbacks, Sequence):
            raise ConfigError(f"callbacks={callbacks!r}: expected a list of objects of type Callback.")
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ConfigError(f"callbacks holds a {type(callback).__name__}; expected objects of type Callback.")
        self._model = model
        self._train = make_source(train_data, transform=transform, collate=collate, name="train_data")
        self._test = _optional_source(test_data, transform, collate)
        self._shaping: dict[str, Any] = {"transform": transform, "collate": collate}
        self._workers = Elastic.of(num_workers)
        self._is_resizable = step_fn is None and not sync.is_local
        self._resources, self._faults = resources, faults
        self._name = _checked_name(name)
        self._storage = None if storage is None else Folder(os.fspath(storage))
        self._prepared: Prepared = prepare(
            model,
            self._train,
            self._test,
            Options(
                workers=self._workers,
                loss=loss,
                optimizer=optimizer,
                scheduler=scheduler,
                metrics=metrics,
                step_fn=step_fn,
                transform=transform,
                collate=collate,
                callbacks=callbacks,
                epochs=epochs,
                steps=steps,
                batch=_batch(batch),
                precision=precision,
                seed=seed,
                reproducible=reproducible,
                parallel=parallel,
                sync=sync,
                checkpoints=checkpoints,
                validate_every=validate_every,
                threads=max(1, int(resources.cpus)),
                patience_s=faults.collective_timeout_s,
            ),
        )

    def train(self) -> Result:
        """Train to the end, with a progress line, and return the result.

        The run belongs to this process: Ctrl-C, SIGTERM or its death stop it at the next step boundary, with a
        checkpoint; starting it again under the same name goes on from there. After a signal the program ends with
        SystemExit(130) or SystemExit(143); a second one interrupts at once.
        """
        spec = self._prepared.spec
        return self._submit(has_lease=True).follow(self._prepared.total_steps, spec.epochs)

    def submit(self) -> Job:
        """Start the run and return at once. It goes on when this process ends, if the Ray cluster does."""
        return self._submit(has_lease=False)

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """Return loss and metrics on `data` (by default the test data).

        With the weights of the trained model, of the newest checkpoint, or the first ones, whichever there are.
        """
        source = self._side_source(data)
        records, _ = self._side_job("evaluate", source)
        found = next(record for record in records if record["event"] == "evaluated")
        return dict(found["metrics"])

    def predict(self, data: Any) -> Any:
        """Return the model's outputs for `data`, in order, as numpy arrays. Of pairs (x, y), x is used."""
        from lepton_ray.cluster.launch import joined_outputs

        _, outputs = self._side_job("predict", self._side_source(data))
        return joined_outputs(outputs)

    # --- starting ----------------------------------------------------------------------------------------------------

    def _submit(self, *, has_lease: bool) -> Job:
        from lepton_ray.cluster import launch

        if self._name is not None and self._storage is not None:
            finished = self._earlier(self._name, self._storage.sub(self._name))
            if isinstance(finished, Job):
                return finished
        spare = max(spare_cpus(source) for source in (self._train, self._test) if source is not None)
        slot = self._connect(spare)
        storage = self._storage = self._storage or launch.default_storage(DEFAULT_STORAGE)
        name = self._name = self._name or _new_name()
        folder = storage.sub(name)
        folder.probe()
        running = launch.running(name)  # waits for one that is just ending: it may have finished
        earlier = self._earlier(name, folder)
        if isinstance(earlier, Job):
            return earlier
        if running is None:
            say(self._prepared.notes)
            running, is_new = launch.start(
                spec=with_place(self._prepared.spec, name, folder.url),
                train_source=self._train,
                test_source=self._test,
                workers=self._workers,
                slot=slot,
                spare_cpus=spare,
                faults=self._faults,
                has_lease=has_lease,
                is_resizable=self._is_resizable,
                generation=earlier,
                header=None if earlier else self._header(name),
            )
            if not is_new:  # another driver was faster: was it with the same configuration?
                launch.running(name)
                self._earlier(name, folder)
        launch.check_folder(running, name, folder)
        return Job(name, folder.url, running, self._model, on_result=self._take_weights)

    def _connect(self, spare: int) -> Slot:
        """Reach a cluster with room for the workers and `spare` more CPUs; return what a worker gets."""
        from lepton_ray.cluster import launch

        launch.connect(self._workers.max, self._resources.cpus, spare)
        least = self._workers.min if self._is_resizable else self._workers.max
        return launch.check_room(least, self._resources, spare)

    def _earlier(self, name: str, folder: Folder) -> Job | int:
        """Return a finished run of this name, or the last generation of an unfinished one (0: there is none).

        Raises ConfigError when the run of this name was another one.
        """
        records: list[dict[str, Any]] = journal.read(folder)
        header = next((record for record in records if record["event"] == "header"), None)
        if header is None:
            return 0
        changes = difference(header["config"], self._prepared.config)
        if changes:
            raise ConfigError(
                f"a run named {name!r} exists in {folder.url} with another configuration:\n  "
                + "\n  ".join(changes)
                + "\nUse another name, or the configuration that it began with."
            )
        ended = next((r for r in records if r["event"] == "ended" and r["outcome"] == "finished"), None)
        if ended is not None:
            say([f"{name} has finished before: this is its result. Use another name to train again."])
            return Job.finished(name, folder.url, ended, self._model, on_result=self._take_weights)
        return max((int(record.get("generation", 0)) for record in records), default=0) or 1

    def _header(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "config": self._prepared.config,
            "num_workers": [self._workers.min, self._workers.max],
            "resources": asdict(self._resources),
            "notes": self._prepared.notes,
        }

    def _take_weights(self, result: Result) -> None:
        """Leave the trained weights in the user's own object, if there is one."""
        if self._prepared.spec.blueprint.kind != "factory":
            result.model()

    # --- evaluation and prediction -----------------------------------------------------------------------------------

    def _side_source(self, data: Any) -> Source | Stream:
        if data is not None:
            return make_source(data, **self._shaping, name="data")
        if self._test is None:
            raise ConfigError("evaluate() needs data: pass some, or test_data= to the trainer.")
        return self._test

    def _side_job(self, mode: Any, source: Source | Stream) -> tuple[list[dict[str, Any]], list[Any]]:
        """Run a job without a journal on the same workers; return its records and outputs."""
        from lepton_ray.cluster import launch

        spare = spare_cpus(source)
        slot = self._connect(spare)
        storage = self._storage or launch.default_storage(DEFAULT_STORAGE)
        run_url = storage.sub(self._name or _new_name()).url
        name = f"{os.path.basename(run_url)}.{mode}-{secrets.token_hex(3)}"
        controller, _ = launch.start(
            spec=replace(with_place(self._prepared.spec, name, run_url), mode=mode),
            train_source=None,
            test_source=source,
            workers=self._workers,
            slot=slot,
            spare_cpus=spare,
            faults=self._faults,
            has_lease=True,
        )
        records, outputs = Job(name, run_url, controller).collect()
        say([record["text"] for record in records if record["event"] == "note"])
        return records, outputs


def _batch(batch: int | Batch) -> Batch:
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, bool) or not isinstance(batch, int):
        raise ConfigError(f"batch={batch!r}: expected a number of samples or a Batch(...).")
    return Batch(samples=batch)


def _optional_source(data: Any, transform: Any, collate: Any) -> Source | Stream | None:
    return None if data is None else make_source(data, transform=transform, collate=collate, name="test_data")


def _checked_name(name: str | None) -> str | None:
    is_fit = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name)
    if name is not None and not is_fit:
        raise ConfigError(f"name={name!r}: use letters, digits, '.', '_' and '-', beginning with a letter or digit.")
    return name


def _new_name() -> str:
    return f"run-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
