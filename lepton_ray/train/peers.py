"""The other workers of a run, as the training code sees them: one protocol, and the case of being alone."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch


class Peers(Protocol):
    """The group of one generation. All calls are made by every member in the same order."""

    rank: int
    world: int

    @property
    def is_in_one_node(self) -> bool:
        """All members share the memory of a node: what they exchange costs a core's time, and hardly any waiting."""

    def allreduce(self, tensor: torch.Tensor, wire: str = "fp32", residual: torch.Tensor | None = None) -> None:
        """Sum a contiguous tensor over the members, in place, to the same bits everywhere.

        wire: the number format in which it travels; "fp32" for its own. residual: of the same shape, what a shorter
        format has left out of this member's earlier tensors: it is added to this one, and set to what is left out now.
        """

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Set a contiguous tensor to that of rank 0, in place."""

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send a contiguous tensor to one member."""

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        """Set a contiguous tensor to what one member sends, in place."""

    def explain(self, size_bytes: int) -> str:
        """Say how so many bytes are summed, and why."""


class Alone:
    """A group of one."""

    rank = 0
    world = 1
    is_in_one_node = True

    def allreduce(self, tensor: torch.Tensor, wire: str = "fp32", residual: torch.Tensor | None = None) -> None:
        """The sum over one member is what it holds."""

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Rank 0 is the only member."""

    def send(self, tensor: torch.Tensor, to: int) -> None:
        raise AssertionError("there is nobody to send to")

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        raise AssertionError("there is nobody to receive from")

    def explain(self, size_bytes: int) -> str:
        return "there is one worker"


class Background:
    """Peers of whom one sum may go on behind the back of the training thread.

    Whatever else is asked of them waits for it, so that all members make their calls in the same order.
    """

    def __init__(self, peers: Peers) -> None:
        self.rank, self.world, self._peers = peers.rank, peers.world, peers
        self._running: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "lepton-background")

    def allreduce(self, tensor: torch.Tensor, wire: str = "fp32", residual: torch.Tensor | None = None) -> None:
        self.join()
        self._peers.allreduce(tensor, wire, residual)

    def broadcast(self, tensor: torch.Tensor) -> None:
        self.join()
        self._peers.broadcast(tensor)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self.join()
        self._peers.send(tensor, to)

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        self.join()
        self._peers.recv(tensor, source)

    def explain(self, size_bytes: int) -> str:
        return self._peers.explain(size_bytes)

    @property
    def is_in_one_node(self) -> bool:
        return self._peers.is_in_one_node

    def start(self, tensor: torch.Tensor, wire: str, residual: torch.Tensor | None) -> None:
        """Begin what `allreduce` does; until `join` has returned, nobody may touch the tensors."""
        self.join()
        self._running = self._thread.submit(self._peers.allreduce, tensor, wire, residual)

    def join(self) -> None:
        """Wait for the sum in the background. Raises what it raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """End the thread, when it has no more to do."""
        self._thread.shutdown(wait=False)
