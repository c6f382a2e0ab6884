"""Collectives of tensors on an accelerator, by what torch has for it, instead of copies through host memory.

A group makes such a thing when its first tensor on an accelerator comes: NCCL (or RCCL) for `cuda`, and for other
devices what torch, or the package of a vendor, has registered as their default. It knows no peer's death and no end of
waiting. So whoever waits here looks after the group beside, and breaks this off when that has failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lepton_ray.errors import LeptonError, PeerLost, WaitTimeout

_POLL_S, _KEY_POLL_S = 50e-6, 2e-3
_KINDS = {"nccl": "ProcessGroupNCCL", "xccl": "ProcessGroupXCCL", "gloo": "ProcessGroupGloo"}

Tensor = torch.Tensor


def backend_for(device_type: str) -> str | None:
    """Return the name of torch's backend for tensors on such a device; None where they go through host memory."""
    try:
        name = dist.get_default_backend_for_device(device_type)
    except ValueError:
        return None
    is_here = hasattr(dist, _KINDS.get(name, "")) or name.upper() in dist.Backend._plugins
    # For others than the CPU, torch names Gloo where there is nothing better: that copies through host memory, too.
    return name if is_here and (name != "gloo" or device_type == "cpu") else None


class Keys(Protocol):
    """Values by name, that all ranks see."""

    def put(self, key: str, value: bytes) -> None: ...

    def find(self, key: str) -> bytes | None: ...

    def delete(self, key: str) -> bool: ...


class KeyStore(dist.Store):
    """A store of torch's, where the ranks of a backend find each other."""

    def __init__(self, keys: Keys, timeout_s: float) -> None:
        super().__init__()
        self._keys, self._timeout_s = keys, timeout_s

    def set(self, key: str, value: bytes | str) -> None:
        self._keys.put(key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._keys.find(key) or b""

    def check(self, keys: Sequence[str]) -> bool:
        return all(self._keys.find(key) is not None for key in keys)

    def delete_key(self, key: str) -> bool:
        return self._keys.delete(key)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        limit_s = self._timeout_s if timeout is None else timeout.total_seconds()
        deadline_s = time.monotonic() + limit_s
        while not self.check(keys):
            if time.monotonic() > deadline_s:
                raise dist.DistStoreError(f"waited {limit_s:g} s for {', '.join(keys)}")
            time.sleep(_KEY_POLL_S)


class Accelerator:
    """One rank's part. Operations are those of Ray's API, on tensors of one kind of device; they wait until it is done.

    look: raises LeptonError when the group beside has failed. end: ends that with a reason, as an error here does, so
    that the other ranks look no longer for what does not come.
    """

    def __init__(
        self,
        name: str,
        store: dist.Store,
        rank: int,
        world: int,
        *,
        timeout_s: float,
        look: Callable[[], object],
        end: Callable[[str], object],
    ) -> None:
        self._timeout_s, self._look, self._end = timeout_s, look, end
        limit = timedelta(seconds=timeout_s)
        plugin = dist.Backend._plugins.get(
            name.upper()
        )  # private as of torch 2.13; public there is only a default group
        if plugin is not None and name not in _KINDS:
            self._backend = plugin.creator_fn(store, rank, world, limit)
            return
        kind = getattr(dist, _KINDS[name])
        if name == "gloo":
            self._backend = kind(store, rank, world, limit)
        else:
            options = kind.Options()
            options._timeout = limit
            self._backend = kind(store, rank, world, options)

    def allreduce(self, tensor: Tensor, op: str) -> None:
        self._run("allreduce", tensor, _options(dist.AllreduceOptions(), op))

    def reduce(self, tensor: Tensor, root: int, op: str) -> None:
        self._run("reduce", tensor, _options(dist.ReduceOptions(), op, root))

    def broadcast(self, tensor: Tensor, root: int) -> None:
        self._run("broadcast", tensor, _options(dist.BroadcastOptions(), root=root))

    def allgather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        into = [output.detach().contiguous() for output in outputs]
        self._await("allgather", [into], [tensor.detach().contiguous()])
        for output, found in zip(outputs, into):
            _bring_back(found, output)

    def reducescatter(self, output: Tensor, inputs: Sequence[Tensor], op: str) -> None:
        parts = [each.detach().contiguous() for each in inputs]
        self._run("reduce_scatter", output, [parts], _options(dist.ReduceScatterOptions(), op))

    def send(self, tensor: Tensor, to: int) -> None:
        self._await("send", [tensor.detach().contiguous()], to, 0)

    def recv(self, tensor: Tensor, source: int) -> None:
        self._run("recv", tensor, source, 0)

    def abort(self) -> None:
        """Break off what is under way. From any thread, and more than once."""
        self._backend.abort()

    def _run(self, call: str, tensor: Tensor, *more: Any) -> None:
        """Make a call whose result is in one tensor."""
        flat = tensor.detach().contiguous()
        self._await(call, [flat], *more)
        _bring_back(flat, tensor)

    def _await(self, call: str, *arguments: Any) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        try:
            work = getattr(self._backend, call)(*arguments)
            while not work.is_completed():  # Gloo's works of messages never say so before they are waited for (2.13)
                self._look()
                if time.monotonic() > deadline_s:
                    raise WaitTimeout(f"{call} on an accelerator was not done after {self._timeout_s:g} s")
                time.sleep(_POLL_S)
            work.wait()  # raises what went wrong; what follows on the device follows it
        except BaseException as error:
            self.abort()
            self._end(f"{call} on an accelerator: {error}")
            if isinstance(error, RuntimeError) and not isinstance(error, LeptonError):
                raise PeerLost(f"{call} on an accelerator failed: {error}") from error
            raise


def _bring_back(contiguous: Tensor, tensor: Tensor) -> None:
    if contiguous.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(contiguous)


def _options(options: Any, op: str | None = None, root: int | None = None) -> Any:
    if op is not None:
        options.reduceOp = getattr(dist.ReduceOp, op.upper())
    if root is not None:
        options.rootRank = root
    return options
