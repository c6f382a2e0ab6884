"""The workers of a generation, joined through Ray's collective API on our backend."""

from __future__ import annotations

import ray.util.collective as collective
import torch

from lepton_ray.collective import ray_group
from lepton_ray.collective.wire import Feedback


class RayPeers:
    """A group of worker actors; see `train.peers.Peers`."""

    def __init__(self, group: str, rank: int, world: int, timeout_s: float, *, tls: bool) -> None:
        """Join `group`, which all `world` members do.

        timeout_s: longest wait for a peer without progress. tls: whether to encrypt what leaves a process over TCP.
        """
        self.rank, self.world, self._group = rank, world, group
        if world > 1:
            ray_group.register(timeout_s=timeout_s, tls=tls)
            collective.init_collective_group(world, rank, backend=ray_group.BACKEND, group_name=group)  # type: ignore[arg-type]

    def allreduce(self, tensor: torch.Tensor, wire: str = "fp32", residual: torch.Tensor | None = None) -> None:
        if self.world == 1:
            return
        if wire == "fp32":
            collective.allreduce(tensor, group_name=self._group)
        else:
            feedback = None if residual is None else Feedback(residual.numpy())
            ray_group.allreduce(self._group, tensor, wire, feedback)

    def broadcast(self, tensor: torch.Tensor) -> None:
        if self.world > 1:
            collective.broadcast(tensor, src_rank=0, group_name=self._group)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        collective.send(tensor, to, group_name=self._group)

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        collective.recv(tensor, source, group_name=self._group)

    def explain(self, size_bytes: int) -> str:
        return ray_group.explain(self._group, size_bytes) if self.world > 1 else "there is one worker"

    def abort(self) -> None:
        """Break what waits in this group, here and at the peers. May be called from any thread."""
        if self.world > 1:
            ray_group.abort(self._group)

    def close(self) -> None:
        """Leave the group."""
        if self.world > 1 and collective.is_group_initialized(self._group):
            collective.destroy_collective_group(self._group)
