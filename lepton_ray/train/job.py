"""A worker's share of a job: train, evaluate or predict."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lepton_ray.data.feed import open_feed
from lepton_ray.data.sources import Source, Stream
from lepton_ray.errors import ConfigError
from lepton_ray.plan.recover import Position
from lepton_ray.storage import Folder
from lepton_ray.train import weights
from lepton_ray.train.checkpoint_format import load, newest
from lepton_ray.train.evaluate import predict
from lepton_ray.train.loop import Loop
from lepton_ray.train.mirror import Mirrors
from lepton_ray.train.outbox import Report
from lepton_ray.train.parts import load_weights, make_parts
from lepton_ray.train.peers import Background, Peers
from lepton_ray.train.spec import TrainSpec
from lepton_ray.train.transfer import give, take

_KIND_BYTES = 256


class Task:
    """A worker's part of a job. Building it makes the model; `join` takes a place among others, `run` does the work."""

    def __init__(
        self,
        spec: TrainSpec,
        *,
        train_source: Source | Stream | None,
        test_source: Source | Stream | None,
        device: torch.device,
        report: Report,
        record: Callable[[int], None],
        wish: Callable[[], bool],
        pause: Callable[[], bool] = lambda: False,
    ) -> None:
        """train_source: None unless the job trains. test_source: what is evaluated or predicted. Others: see `Loop`."""
        torch.set_num_threads(spec.threads)
        if spec.reproducible:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.set_deterministic_debug_mode("error")  # `use_deterministic_algorithms` imports the compiler: 2 s
        self._spec, self._report, self._source = spec, report, test_source
        self._notes: list[str] = []
        feed = None
        if train_source is not None:
            assert spec.batch.microbatches is not None
            feed = open_feed(
                train_source,
                batch_samples=spec.batch.samples,
                microbatches=spec.batch.microbatches,
                seed=spec.seed,
            )
        self._kind = f"{_name_of(device)} and {torch.get_num_threads()} threads"
        self.parts = make_parts(spec, feed, device, self._notes.append)
        self._is_clean = True
        """The last generation, if there was one, did not break."""
        self.loop: Loop | None = None
        if feed is not None:
            self.loop = Loop(
                spec,
                self.parts,
                feed=feed,
                test_source=test_source,
                report=report,
                record=record,
                wish=wish,
                pause=pause,
            )

    @property
    def step(self) -> int | None:
        """Steps that are done; None for a job that does not train."""
        return self.loop.state.step if self.loop else None

    @property
    def committed(self) -> int:
        """Transactions that are done."""
        return self.loop.state.committed if self.loop else 0

    def position(self) -> Position | None:
        """Say where this worker stands, for others to go on from; see `Loop.position`."""
        return self.loop.position() if self.loop else None

    def settle(self, ballot: Sequence[float] | None = None) -> None:
        """Close what was open when the last generation ended; see `Loop.settle`."""
        if self.loop is not None:
            self.loop.settle(ballot)

    def lend(self, peers: Peers) -> None:
        """Give the state of the training to all others of a group, of which this is rank 0."""
        assert self.loop is not None
        give(peers, *self.loop.copy_out())

    def borrow(self, peers: Peers) -> None:
        """Take over the state that rank 0 of a group gives."""
        assert self.loop is not None
        self.loop.copy_in(*take(peers, self.loop.room()))

    def join(
        self,
        peers: Peers,
        generation: int,
        *,
        is_fresh: bool = True,
        since_step: int = 0,
        mirrors: Mirrors | None = None,
        everybody: Peers | None = None,
    ) -> None:
        """Take a place in a generation; see `Loop.join`. everybody: the peers, where replicas have one worker."""
        if self._spec.sync.is_local:
            peers = Background(peers)
        self._peers, everybody = peers, everybody or peers
        self._is_first = everybody.rank == 0
        if self._spec.reproducible:
            self._check_kind(self._kind_of_first(peers))
        self.parts.bind(peers, is_clean=self._is_clean)
        self._is_clean = False
        if self._spec.sync.wire != "fp32":
            sizes = [p.numel() * p.itemsize for p in self.parts.model.parameters().values()]
            self._notes.append(f"gradients travel as {self._spec.sync.wire}; {peers.explain(sum(sizes))}")
        notes, self._notes[:] = list(self._notes), []
        for text in notes:
            self._note(text)
        if self.loop is not None:
            self.loop.join(peers, everybody, generation, is_fresh=is_fresh, since_step=since_step, mirrors=mirrors)
            if self._spec.reproducible and is_fresh:
                self._check_kind(self.loop.state.kind or self._kind)
                self.loop.state.kind = self._kind

    def run(self) -> tuple[bool, list[Any]]:
        """Do the work. Returns whether it is over, not paused, and the numbered blocks of a prediction."""
        if self.loop is not None:
            is_over = self.loop.run()
            self._is_clean = True
            return is_over, []
        self._load()
        assert self._source is not None
        if self._spec.mode == "predict":
            return True, predict(self.parts.model, self._source, self.parts.how)
        found = self.parts.evaluate(self._source)
        if self._peers.rank == 0:
            self._report("evaluated", metrics=found)
        return True, []

    def close(self) -> None:
        """Let go of the model."""
        if self.loop is not None:
            self.loop.close()
        if hasattr(self.parts, "stepper"):
            self.parts.stepper.close()

    def _kind_of_first(self, peers: Peers) -> str:
        """Return what the worker of rank 0 runs on."""
        told = torch.zeros(_KIND_BYTES, dtype=torch.uint8)
        own = self._kind.encode()[:_KIND_BYTES]
        told[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        peers.broadcast(told)
        return bytes(told.tolist()).rstrip(b"\0").decode(errors="replace")

    def _check_kind(self, found: str) -> None:
        if found != self._kind:
            raise ConfigError(
                f"reproducible=True needs one kind of device throughout a run: this worker has {self._kind}, others "
                f"had {found}. Ask for one kind with Resources(custom={{...}}) and the same cpus=, or train under "
                "another name."
            )

    def _note(self, text: str) -> None:
        if self._is_first:
            self._report("note", text=text)

    def _load(self) -> None:
        """Load the trained weights of the run, or those of its newest checkpoint, when it has any."""
        folder = Folder(self._spec.run_url)
        if folder.exists(weights.NAME):
            load_weights(self.parts.model, weights.read_weights(folder))
            return
        found, _ = newest(folder.sub("checkpoints"))
        if found is not None:
            load_weights(self.parts.model, load(folder.sub("checkpoints"), found.step)[0])
            self._note(f"the run has not finished: these are its weights after {found.step} steps")


def _name_of(device: torch.device) -> str:
    """Name what decides in which order kernels add."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a CPU with {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def own_device() -> torch.device:
    """Return the accelerator of this process, or the CPU where there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
