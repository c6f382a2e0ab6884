"""A worker's share of a job: train, evaluate or predict."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from lepton_ray.data.feed import open_feed
from lepton_ray.data.sources import Source, Stream
from lepton_ray.storage import Folder
from lepton_ray.train import weights
from lepton_ray.train.checkpoint_format import load, newest
from lepton_ray.train.evaluate import predict
from lepton_ray.train.loop import Loop, Report
from lepton_ray.train.parts import load_weights, make_parts
from lepton_ray.train.peers import Background, Peers
from lepton_ray.train.spec import TrainSpec


class Task:
    """One rank of a job. Building it makes the model; `run` does the work."""

    def __init__(
        self,
        spec: TrainSpec,
        *,
        train_source: Source | Stream | None,
        test_source: Source | Stream | None,
        peers: Peers,
        device: torch.device,
        generation: int,
        report: Report,
        record: Callable[[int], None],
        wish: Callable[[], bool],
    ) -> None:
        """train_source: None unless the job trains. test_source: what is evaluated or predicted. Others: see `Loop`."""
        torch.set_num_threads(spec.threads)
        if spec.reproducible:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.set_deterministic_debug_mode("error")  # `use_deterministic_algorithms` imports the compiler: 2 s
        if spec.sync.is_local:
            peers = Background(peers)
        self._spec, self._peers, self._report, self._source = spec, peers, report, test_source
        feed = None
        if train_source is not None:
            feed = open_feed(
                train_source,
                batch_samples=spec.batch.samples,
                microbatches=spec.batch.microbatches or peers.world,
                seed=spec.seed,
            )
        self._parts = make_parts(spec, feed, peers, device, self._note)
        if spec.sync.wire != "fp32":
            sizes = [p.numel() * p.itemsize for p in self._parts.model.parameters().values()]
            self._note(f"gradients travel as {spec.sync.wire}; {peers.explain(sum(sizes))}")
        self._loop = None
        if feed is not None:
            self._loop = Loop(
                spec,
                self._parts,
                feed=feed,
                test_source=test_source,
                peers=peers,
                generation=generation,
                report=report,
                record=record,
                wish=wish,
            )

    @property
    def step(self) -> int | None:
        """Steps that are done; None for a job that does not train."""
        return self._loop.step if self._loop else None

    def run(self) -> list[Any]:
        """Do the work; return the numbered blocks of a prediction, otherwise nothing."""
        if self._loop is not None:
            self._loop.run()
            return []
        self._load()
        assert self._source is not None
        if self._spec.mode == "predict":
            return predict(self._parts.model, self._source, self._parts.how)
        found = self._parts.evaluate(self._source)
        if self._peers.rank == 0:
            self._report("evaluated", metrics=found)
        return []

    def close(self) -> None:
        """Let go of the model."""
        self._parts.stepper.close()

    def _note(self, text: str) -> None:
        if self._peers.rank == 0:
            self._report("note", text=text)

    def _load(self) -> None:
        """Load the trained weights of the run, or those of its newest checkpoint, when it has any."""
        folder = Folder(self._spec.run_url)
        if folder.exists(weights.NAME):
            load_weights(self._parts.model, weights.read_weights(folder))
            return
        found, _ = newest(folder.sub("checkpoints"))
        if found is not None:
            load_weights(self._parts.model, load(folder.sub("checkpoints"), found.step)[0])
            self._note(f"the run has not finished: these are its weights after {found.step} steps")
