"""What the user writes: frozen dataclasses, checked where they are built.

Checks inside one object live in its `__post_init__`; checks between objects in `check`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from lepton_ray.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[str, ...] = ("fp32", "bf16", "fp16")
Wire = Literal["fp32", "bf16", "int8", "auto"]
WIRES: tuple[str, ...] = ("fp32", "bf16", "int8", "auto")


_TIMEOUTS = ("collective_timeout_s", "start_timeout_s", "admit_timeout_s", "silence_timeout_s", "settle_timeout_s")


def _positive(owner: str, name: str, value: float, *, least: float = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value < least:
        raise ConfigError(f"{owner}({name}={value!r}): expected a number >= {least:g}.")


def _whole(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{owner}({name}={value!r}): expected a whole number >= 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """How much data makes one step."""

    samples: int = 64
    """Samples of one step over all workers together (the global batch)."""
    microbatches: int | None = None
    """Pieces that a step is cut into; the unit of work and of random numbers. None: the number of workers."""
    clip_norm: float | None = None
    """Largest L2 norm of the mean gradient of a step; larger ones are scaled down to it. None: no clipping."""

    def __post_init__(self) -> None:
        _whole("Batch", "samples", self.samples)
        if self.microbatches is not None:
            _whole("Batch", "microbatches", self.microbatches)
            if self.samples < self.microbatches:
                raise ConfigError(
                    f"Batch(samples={self.samples}, microbatches={self.microbatches}): a microbatch would be empty. "
                    f"Use at least {self.microbatches} samples or at most {self.samples} microbatches."
                )
        if self.clip_norm is not None:
            _positive("Batch", "clip_norm", self.clip_norm, least=0)
            if self.clip_norm == 0:
                raise ConfigError("Batch(clip_norm=0) would take away every gradient. Use None for no clipping.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one worker asks of Ray."""

    cpus: float = 1
    """CPUs of one worker; torch uses as many threads (at least one)."""
    gpus: float | None = None
    """GPUs of one worker. None: one when the cluster has at least num_workers of them, otherwise none."""
    custom: dict[str, float] = field(default_factory=dict)
    """Further Ray resources, for example {"TPU": 1}."""

    def __post_init__(self) -> None:
        _positive("Resources", "cpus", self.cpus, least=0)
        if self.gpus is not None:
            _positive("Resources", "gpus", self.gpus, least=0)
        for name, amount in self.custom.items():
            if name in ("CPU", "GPU", "memory"):
                raise ConfigError(f"Resources(custom={self.custom!r}): use cpus and gpus for {name}.")
            _positive("Resources", f"custom[{name!r}]", amount, least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Elastic:
    """How many workers a run may have; it takes as many as there is room for, and goes on while some are exchanged."""

    min: int = 1
    """It begins, and goes on, with as few."""
    max: int
    """It never has more."""
    is_fixed: bool = False
    """It begins with all of them."""

    def __post_init__(self) -> None:
        for name in ("min", "max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"Elastic({name}={value!r}): expected a whole number >= 1.")
        if self.min > self.max:
            raise ConfigError(f"Elastic(min={self.min}, max={self.max}): min is more than max.")

    @classmethod
    def of(cls, workers: int | tuple[int, int] | Elastic) -> Elastic:
        """Read what the user may write: a number, (min, max) or an Elastic. Raises ConfigError."""
        if isinstance(workers, Elastic):
            return workers
        if isinstance(workers, tuple) and len(workers) == 2:
            return cls(min=workers[0], max=workers[1])
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ConfigError(
                f"num_workers={workers!r}: expected a whole number >= 1, or Elastic(min=..., max=...), or (min, max)."
            )
        return cls(min=workers, max=workers, is_fixed=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What a run survives, and how patient it is."""

    retries: int = 3
    """Failures in a row, without a step in between, that a run survives."""
    silence_timeout_s: float = 1.5
    """Longest time that a worker may owe an answer while the others answer."""
    settle_timeout_s: float = 30
    """Longest time that a worker may take to leave a step that the others have left."""

    mirror_every: int | None = None
    """Steps between copies of the training state into the memory of another process, from which the run goes on when
    no worker is left that holds it. None: 10 where there is another node to hold them, fewer where they are large; on
    a single node none. 0: none."""

    collective_timeout_s: float = 60
    """Longest time that a collective waits for a peer without progress."""
    start_timeout_s: float = 120
    """Longest time from admission until all workers are ready (process start, imports)."""
    admit_timeout_s: float = 600
    """Longest time that a job waits for resources that other jobs hold."""
    lease_s: float = 15
    """A worker ends itself when its controller, and a controller when its driver, was silent for so long."""

    def __post_init__(self) -> None:
        for name in (*_TIMEOUTS, "lease_s"):
            _positive("Faults", name, getattr(self, name), least=0.1)
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise ConfigError(f"Faults(retries={self.retries!r}): expected a whole number >= 0.")
        every = self.mirror_every
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 0):
            raise ConfigError(f"Faults(mirror_every={every!r}): expected a whole number >= 0, or None.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How one copy of the model is laid out. One replica is pipeline x tensor x shard workers."""

    pipeline: int = 1
    tensor: int = 1
    shard: int = 1

    def __post_init__(self) -> None:
        for name in ("pipeline", "tensor", "shard"):
            _whole("Parallel", name, getattr(self, name))

    @property
    def replica_size(self) -> int:
        """Workers that hold one whole copy of the model."""
        return self.pipeline * self.tensor * self.shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """When the training state is written, and what is kept."""

    every_steps: int | None = None
    """Steps between checkpoints. None: at the end of each epoch; every 100 to 1000 where steps= may see none."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    best: str | None = None
    """"train_loss" or a test metric such as "test_accuracy": the checkpoint with its best value is kept as well."""
    best_mode: Literal["auto", "min", "max"] = "auto"
    """Whether small or large is better. "auto": max when the name holds accuracy, auc, f1 or top, otherwise min."""

    def __post_init__(self) -> None:
        if self.every_steps is not None:
            _whole("Checkpoints", "every_steps", self.every_steps)
        _whole("Checkpoints", "keep", self.keep)
        if self.best_mode not in ("auto", "min", "max"):
            raise ConfigError(f"Checkpoints(best_mode={self.best_mode!r}): expected 'auto', 'min' or 'max'.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterSGD:
    """How the mean progress of the workers moves the weights that they share, as torch's SGD moves by a gradient.

    Source: DiLoCo (Douillard et al., 2023), whose values are the defaults.
    """

    lr: float = 0.7
    """Step size: 1.0 without momentum sets the shared weights to the mean of the workers'."""
    momentum: float = 0.9
    """Part of the earlier progress that is kept, from 0 to below 1."""
    nesterov: bool = True
    """Nesterov's form of the momentum."""

    def __post_init__(self) -> None:
        _positive("OuterSGD", "lr", self.lr, least=0)
        _positive("OuterSGD", "momentum", self.momentum, least=0)
        if not 0 < self.lr < math.inf or self.momentum >= 1:
            raise ConfigError(
                f"OuterSGD(lr={self.lr!r}, momentum={self.momentum!r}): expected an lr above 0 and a momentum below 1."
            )
        if not isinstance(self.nesterov, bool):
            raise ConfigError(f"OuterSGD(nesterov={self.nesterov!r}): expected True or False.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """When the workers add up what they learnt, and in which number format it travels.

    Made by `Sync.every_step` or `Sync.local`.
    """

    steps: int | None = None
    """Steps that each worker does by itself between two exchanges of a weight. None: gradients are summed each step."""
    outer: OuterSGD = OuterSGD()
    """What is done with the progress of local steps."""
    fragments: int = 1
    """Parts of the weights that are exchanged in turns, spread over `steps`."""
    delay: int = 0
    """Local steps during which an exchange goes on in the background."""
    wire: Wire = "fp32"
    """Number format of gradients or progress between workers. "auto": a shorter one where the link is slow."""
    tls: bool = False
    """Encrypt what workers send each other over the network. Needs `pip install 'lepton-ray[tls]'`."""

    @classmethod
    def every_step(cls, wire: Wire = "fp32", *, tls: bool = False) -> Sync:
        """Sum the gradients in every step."""
        return cls(wire=wire, tls=tls)

    @classmethod
    def local(
        cls,
        *,
        steps: int,
        outer: OuterSGD = OuterSGD(),
        fragments: int = 1,
        delay: int | None = None,
        wire: Wire = "fp32",
        tls: bool = False,
    ) -> Sync:
        """Let workers train by themselves, and exchange what they learnt every `steps` steps.

        delay: None for a tenth of the steps between two exchanges.
        """
        _whole("Sync.local", "steps", steps)
        _whole("Sync.local", "fragments", fragments)
        chosen = steps // fragments // 10 if delay is None else delay
        return cls(steps=steps, outer=outer, fragments=fragments, delay=chosen, wire=wire, tls=tls)

    def __post_init__(self) -> None:
        if self.wire not in WIRES:
            raise ConfigError(f"Sync(wire={self.wire!r}): expected one of {', '.join(WIRES)}.")
        if not isinstance(self.tls, bool):
            raise ConfigError(f"Sync(tls={self.tls!r}): expected True or False.")
        if self.tls and find_spec("cryptography") is None:
            raise ConfigError(
                "Sync(tls=True) needs the package cryptography, here and on every node: pip install 'lepton-ray[tls]'."
            )
        if not isinstance(self.outer, OuterSGD):
            raise ConfigError(f"Sync(outer={self.outer!r}): expected an OuterSGD(...).")
        _whole("Sync", "fragments", self.fragments)
        if self.steps is None:
            if (self.outer, self.fragments, self.delay) != (OuterSGD(), 1, 0):
                raise ConfigError(f"{self} has settings of local steps, but no steps. Use Sync.local(steps=...).")
            return
        _whole("Sync.local", "steps", self.steps)
        if self.fragments > self.steps:
            raise ConfigError(
                f"Sync.local(steps={self.steps}, fragments={self.fragments}): no more than one fragment leaves after a "
                f"step. Use at most {self.steps} fragments."
            )
        longest = self.steps // self.fragments - 1
        if isinstance(self.delay, bool) or not isinstance(self.delay, int) or not 0 <= self.delay <= longest:
            raise ConfigError(
                f"Sync.local(steps={self.steps}, fragments={self.fragments}, delay={self.delay!r}): an exchange must "
                f"end before the next begins. Expected a whole number from 0 to {longest}."
            )

    @property
    def is_local(self) -> bool:
        """Workers train by themselves for some steps."""
        return self.steps is not None


def is_larger_better(metric: str, mode: Literal["auto", "min", "max"]) -> bool:
    """Tell which way a metric is to go. "auto": up for accuracy, auc, f1 and top-k by name, down for all else."""
    is_rising = any(word in metric.lower() for word in ("accuracy", "auc", "f1", "top"))
    return mode == "max" or (mode == "auto" and is_rising)


def check(
    *,
    workers: Elastic,
    batch: Batch,
    epochs: int | None,
    steps: int | None,
    precision: str,
    parallel: Parallel,
    seed: int,
    validate_every: int | None,
    sync: Sync,
    reproducible: bool,
) -> Batch:
    """Check what concerns several options at once; return the batch with its microbatches filled in.

    Raises ConfigError.
    """
    num_workers = workers.max
    if epochs is not None and steps is not None:
        raise ConfigError(f"epochs={epochs} and steps={steps} contradict each other. Give one of them.")
    for name, value in (("epochs", epochs), ("steps", steps), ("validate_every", validate_every)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}={value!r}: expected a whole number >= 1.")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed!r}: expected a whole number from 0 to 2**63 - 1.")
    size = parallel.replica_size
    if size > 1:
        raise ConfigError(
            f"Parallel(pipeline={parallel.pipeline}, tensor={parallel.tensor}, shard={parallel.shard}) asks for "
            f"replicas of {size} workers; this version trains replicas of one worker (data parallelism). "
            "Use Parallel()."
        )
    if reproducible and (sync.is_local or sync.wire != "fp32"):
        found = f"Sync.local(steps={sync.steps})" if sync.is_local else f"Sync.every_step(wire={sync.wire!r})"
        raise ConfigError(
            f"reproducible=True promises the weights of steps together in full precision; sync={found} gives "
            "others. Use Sync.every_step(), or leave reproducible alone."
        )
    microbatches = batch.microbatches or num_workers
    if batch.samples < microbatches:
        raise ConfigError(
            f"batch={batch.samples} samples cannot feed {microbatches} microbatches (one per worker by default). "
            f"Use a batch of at least {microbatches}, or fewer workers."
        )
    if microbatches < num_workers:
        raise ConfigError(
            f"Batch(microbatches={microbatches}) is smaller than num_workers={num_workers}: "
            f"{num_workers - microbatches} workers would idle. Use microbatches >= {num_workers} or fewer workers."
        )
    return Batch(samples=batch.samples, microbatches=microbatches, clip_norm=batch.clip_norm)
