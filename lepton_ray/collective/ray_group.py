"""Put `Group` under Ray's collective API as the backend "LEPTON".

    register()
    ray.util.collective.init_collective_group(world, rank, backend="LEPTON", group_name="job/1")
    ray.util.collective.allreduce(tensor, group_name="job/1")

Ray's API takes torch tensors and numpy arrays. CPU tensors that are contiguous are reduced where they lie; others go
through a contiguous copy. The fastest lie in memory from `empty`. Tensors on an accelerator go by what torch has for it
(`accelerator`), and where that is nothing, through host memory.

Ranks meet through Ray's internal key-value store. The keys live only while the group is being formed. The name of a
group that failed is spent: put a generation into it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import quote
from weakref import WeakValueDictionary

import numpy as np
import ray
import torch
from ray.experimental import internal_kv
from ray.util.collective.backend_registry import _global_registry, register_collective_backend
from ray.util.collective.collective_group.base_collective_group import BaseGroup
from ray.util.collective.types import ReduceOp

from lepton_ray.collective.accelerator import Accelerator, KeyStore, backend_for
from lepton_ray.collective.calls import MAX, MIN, PRODUCT, SUM, Array, Reduction
from lepton_ray.collective.group import Group
from lepton_ray.collective.tensors import empty as empty
from lepton_ray.collective.tensors import flat, reduction_of
from lepton_ray.collective.tls import make_identity
from lepton_ray.collective.wire import Feedback
from lepton_ray.errors import ConfigError, PeerLost, WaitTimeout
from lepton_ray.plan.transport import Wire

BACKEND = "LEPTON"
_NAMESPACE = b"lepton"
_SECRET_BYTES, _NONCE_BYTES = 32, 16
_POLL_S = 0.002  # the key-value store has no way to wait for a key

Tensor = Any  # torch.Tensor or np.ndarray, as Ray's API hands it over
Options = Any  # Ray hands over an instance, its class, or nothing

_forming_or_formed: WeakValueDictionary[str, LeptonGroup] = WeakValueDictionary()


def register(timeout_s: float | None = None, tls: bool | None = None) -> None:
    """Make the backend known to Ray in this process: the driver's and each actor's. May be called again.

    timeout_s: how long the groups that this process forms from now on wait without progress; Ray has no way to pass it
    to a backend of our own. None leaves it as it is, 60 s at first.
    tls: whether these groups encrypt what leaves a process over TCP. Needs the package cryptography on rank 0, whose
    choice counts; a rank that asks for it takes part in no group without. None leaves it as it is, False at first.
    """
    if timeout_s is not None:
        LeptonGroup.timeout_s = timeout_s
    if tls is not None:
        LeptonGroup.tls = tls
    if not _global_registry.is_registered(BACKEND):
        register_collective_backend(BACKEND, LeptonGroup)


def abort(group_name: str, reason: str = "aborted") -> bool:
    """End a group of this process, formed or still forming, from any thread; return whether there is one.

    Ray's own look-up is of no use here: it holds its lock while a group forms.
    """
    group = _forming_or_formed.get(group_name)
    if group is not None:
        group.abort(reason)
    return group is not None


def allreduce(group_name: str, tensor: Tensor, wire: str = Wire.FP32.value, feedback: Feedback | None = None) -> None:
    """Sum a tensor over a group of this process, as Ray's function does, but with what that has no way to say.

    wire, feedback: as `Group.allreduce`.
    """
    array, finish = _flat(tensor)
    _forming_or_formed[group_name].formed.allreduce(array, reduction_of(SUM, tensor.dtype), wire, feedback)
    finish()


def explain(group_name: str, size_bytes: int) -> str:
    """Say how a group of this process sums so many bytes, and why; see `Group.explain`."""
    return _forming_or_formed[group_name].formed.explain(size_bytes)


def is_in_one_node(group_name: str) -> bool:
    """Tell whether all ranks of a group of this process share the memory of one node."""
    return _forming_or_formed[group_name].formed.is_in_one_node


class _Unlike(ConfigError, RuntimeError):
    """Tensors that do not belong together: a RuntimeError where Ray's own backends raise one."""


class _Keys:
    """Keys in Ray's store, under a prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def put(self, key: str, value: bytes) -> None:
        internal_kv._internal_kv_put(self.prefix + key, value, overwrite=True, namespace=_NAMESPACE)

    def find(self, key: str) -> bytes | None:
        found = internal_kv._internal_kv_get(self.prefix + key, namespace=_NAMESPACE)
        return None if found is None else bytes(found)

    def delete(self, key: str) -> bool:
        return bool(internal_kv._internal_kv_del(self.prefix + key, namespace=_NAMESPACE))

    def clear(self) -> None:
        internal_kv._internal_kv_del(self.prefix, del_by_prefix=True, namespace=_NAMESPACE)


class LeptonGroup(BaseGroup):
    """One process's part of a group. Made by Ray, in an actor or task."""

    timeout_s: ClassVar[float] = 60
    tls: ClassVar[bool] = False
    is_in_host: ClassVar[attrgetter[bool]] = attrgetter("is_cpu")
    """Whether a tensor lies in host memory."""

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        self._aborted: str | None = None
        self._group: Group | None = None
        self._accelerators: dict[str, Accelerator | None] = {}
        self._keys = keys = _Keys(f"collective/{quote(group_name, safe='')}/")
        _forming_or_formed[group_name] = self
        deadline_s = time.monotonic() + self.timeout_s
        if world_size == 1:
            self._group = Group(rank, world_size, secret=b"")
            return
        try:
            if rank == 0:
                known = secrets.token_bytes(_SECRET_BYTES) + (make_identity() if self.tls else b"")
                keys.put("secret", known)
            else:
                known = self._await_key("secret", "rank 0", deadline_s)
            secret, identity = known[:_SECRET_BYTES], known[_SECRET_BYTES:] or None
            if self.tls and identity is None:
                raise ConfigError(
                    f"rank {rank} of group {group_name!r} asks for TLS, and rank 0 does not. "
                    "Call register(tls=True) in the processes of all ranks."
                )
            host = ray.util.get_node_ip_address()
            self._group = Group(rank, world_size, secret=secret, timeout_s=self.timeout_s, host=host, identity=identity)
            if self._aborted is not None:
                self._group.abort(self._aborted)

            def exchange(address: bytes) -> Sequence[bytes]:
                keys.put(str(rank), address)
                return [
                    address if peer == rank else self._await_key(str(peer), f"rank {peer}", deadline_s)
                    for peer in range(world_size)
                ]

            self._group.form(exchange)
            if rank == 0:  # all have connected to us, so all have read all addresses
                keys.clear()
            # Nobody goes on, and perhaps forms a group of this name again, before the keys are gone.
            self._group.barrier()
        except BaseException:
            if self._group is not None:
                self._group.close()
            for key in (str(rank), "secret") if rank == 0 else (str(rank),):
                keys.delete(key)
            raise

    def _await_key(self, key: str, owner: str, deadline_s: float) -> bytes:
        while True:
            value = self._keys.find(key)
            if value is not None:
                return value
            if self._aborted is not None:
                raise PeerLost(f"rank {self._rank} stopped forming group {self._group_name!r}: {self._aborted}")
            if time.monotonic() > deadline_s:
                raise WaitTimeout(
                    f"rank {self._rank} of group {self._group_name!r} waited {self.timeout_s:g} s for {owner} to show "
                    "up. Every rank must call init_collective_group with the same group_name and world_size."
                )
            time.sleep(_POLL_S)

    @classmethod
    def backend(cls) -> str:
        return BACKEND

    @classmethod
    def check_backend_availability(cls) -> bool:
        return True

    def abort(self, reason: str = "aborted") -> None:
        """End the group from any thread: operations that block in it, on any rank, raise PeerLost at once."""
        self._aborted = reason
        if self._group is not None:
            self._group.abort(reason)

    def destroy_group(self) -> None:
        for accelerator in filter(None, self._accelerators.values()):
            accelerator.abort()
            _Keys(f"{self._keys.prefix}accelerators/").clear()
        if self._group is not None:
            self._group.close()
        if _forming_or_formed.get(self._group_name) is self:
            del _forming_or_formed[self._group_name]

    def allreduce(self, tensor: list[Tensor], allreduce_options: Options = None) -> None:
        op = _reduction(tensor[0], allreduce_options)
        if (accelerator := self._accelerator(tensor[0])) is not None:
            accelerator.allreduce(tensor[0], op.name)
            return
        array, finish = _flat(tensor[0])
        self.formed.allreduce(array, op)
        finish()

    def barrier(self, barrier_options: Options = None) -> None:
        self.formed.barrier()

    def reduce(self, tensor: list[Tensor], reduce_options: Options = None) -> None:
        root = reduce_options.root_rank if reduce_options is not None else 0
        op = _reduction(tensor[0], reduce_options)
        if (accelerator := self._accelerator(tensor[0])) is not None:
            accelerator.reduce(tensor[0], root, op.name)
            return
        array, finish = _flat(tensor[0], is_written=root == self._rank)
        self.formed.reduce(array, root, op)
        finish()

    def broadcast(self, tensor: list[Tensor], broadcast_options: Options = None) -> None:
        root = broadcast_options.root_rank if broadcast_options is not None else 0
        if (accelerator := self._accelerator(tensor[0])) is not None:
            accelerator.broadcast(tensor[0], root)
            return
        array, finish = _flat(tensor[0], is_written=root != self._rank)
        self.formed.broadcast(array, root)
        finish()

    def allgather(
        self, tensor_list: list[list[Tensor]], tensor: list[Tensor], allgather_options: Options = None
    ) -> None:
        outputs = tensor_list[0]
        self._check_alike("allgather", outputs, tensor[0])
        if (accelerator := self._accelerator(tensor[0])) is not None:
            accelerator.allgather(outputs, tensor[0])
            return
        targets = [_flat(output) for output in outputs]
        array, _ = _flat(tensor[0], is_written=False)
        self.formed.allgather_into([target for target, _ in targets], array)
        for _, finish in targets:
            finish()

    def reducescatter(
        self, tensor: list[Tensor], tensor_list: list[list[Tensor]], reducescatter_options: Options = None
    ) -> None:
        inputs = tensor_list[0]
        self._check_alike("reducescatter", inputs, tensor[0])
        op = _reduction(tensor[0], reducescatter_options)
        if (accelerator := self._accelerator(tensor[0])) is not None:
            accelerator.reducescatter(tensor[0], inputs, op.name)
            return
        output, finish = _flat(tensor[0])
        self.formed.reducescatter_into(output, [_flat(each, is_written=False)[0] for each in inputs], op)
        finish()

    def send(self, tensor: list[Tensor], send_options: Options) -> None:
        if (accelerator := self._agreed(tensor[0])) is not None:
            accelerator.send(tensor[0], send_options.dst_rank)
            return
        array, _ = _flat(tensor[0], is_written=False)
        self.formed.send(array, send_options.dst_rank)

    def recv(self, tensor: list[Tensor], recv_options: Options) -> None:
        if (accelerator := self._agreed(tensor[0])) is not None:
            accelerator.recv(tensor[0], recv_options.src_rank)
            return
        array, finish = _flat(tensor[0])
        self.formed.recv(array, recv_options.src_rank)
        finish()

    @property
    def formed(self) -> Group:
        """Return the group behind Ray's."""
        assert self._group is not None  # Ray calls nothing before the constructor has returned
        return self._group

    def _accelerator(self, tensor: Tensor) -> Accelerator | None:
        """Return what carries tensors of this device; None for those in host memory, or that go through it."""
        if isinstance(tensor, np.ndarray) or self.is_in_host(tensor):
            return None
        device = tensor.device.type
        if device not in self._accelerators:
            self._accelerators[device] = self._agree_on(device)
        return self._accelerators[device]

    def _agreed(self, tensor: Tensor) -> Accelerator | None:
        """The same for a message: two ranks alone cannot agree with all, and take what was agreed on before."""
        return None if isinstance(tensor, np.ndarray) else self._accelerators.get(tensor.device.type)

    def _agree_on(self, device: str) -> Accelerator | None:
        """Make what all ranks have for a device, if they do."""
        name = backend_for(device) or ""
        said = secrets.token_bytes(_NONCE_BYTES) + name.encode().ljust(_NONCE_BYTES)
        rows = self.formed.allgather(np.frombuffer(said[: 2 * _NONCE_BYTES], np.uint8))
        if not name or len({row[_NONCE_BYTES:].tobytes() for row in rows}) > 1:
            return None
        # Keys of an earlier try are not those of this one.
        keys = _Keys(f"{self._keys.prefix}accelerators/{rows[0][:_NONCE_BYTES].tobytes().hex()}/")
        store = KeyStore(keys, self.timeout_s)
        look, end = self.formed.look, self.formed.abort
        return Accelerator(name, store, self._rank, self._world_size, timeout_s=self.timeout_s, look=look, end=end)

    def _check_alike(self, call: str, tensors: Sequence[Tensor], model: Tensor) -> None:
        """Check a list that holds one tensor for each rank."""
        if len(tensors) != self._world_size:
            raise _Unlike(f"{call} got a list of {len(tensors)} tensors for {self._world_size} ranks.")
        for each in tensors:
            is_like = each.shape == model.shape and (
                each.dtype == model.dtype or _dtype_name(each) == _dtype_name(model)
            )
            if not is_like:
                raise _Unlike(
                    f"{call} got a tensor of shape {tuple(each.shape)} and dtype {each.dtype} beside one of shape "
                    f"{tuple(model.shape)} and dtype {model.dtype}: all must be alike."
                )


def _flat(tensor: Tensor, *, is_written: bool = True) -> tuple[Array, Callable[[], object]]:
    """Show a tensor as a 1-D array, in place if it is contiguous and in host memory, otherwise as a copy.

    Returns the array, and what brings a result in it back to the tensor.
    """
    if isinstance(tensor, torch.Tensor):
        return flat(tensor, is_written=is_written)
    if isinstance(tensor, np.ndarray):
        if is_written and not tensor.flags.writeable:
            tensor = _opened(tensor)
        if tensor.flags.c_contiguous:
            return tensor.reshape(-1), _nothing
        contiguous = np.ascontiguousarray(tensor)
        back = partial(np.copyto, tensor, contiguous)
        return contiguous.reshape(-1), back if is_written else _nothing
    raise ConfigError(f"the collective got a {type(tensor).__name__}: expected a torch tensor or a numpy array.")


def _opened(tensor: Array) -> Array:
    """Show a read-only array that came through Ray, such as an actor's argument, as one that can be written.

    Ray's own backends write into those too, and programs that were written for them count on it. A large one lies in
    the object store: whoever else holds the object sees it change.
    """
    owner: object = tensor
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if type(owner).__module__ != "ray._raylet":
        raise ConfigError("the collective would write its result into a read-only array. Use x.copy().")
    memory = {**tensor.__array_interface__, "data": (tensor.__array_interface__["data"][0], False)}
    return np.asarray(SimpleNamespace(__array_interface__=memory, owner=tensor))


def _nothing() -> None:
    """Bring nothing back: the result is where it belongs."""


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


_PLAIN = {ReduceOp.SUM: SUM, ReduceOp.PRODUCT: PRODUCT, ReduceOp.MIN: MIN, ReduceOp.MAX: MAX}


def _reduction(tensor: Tensor, options: Options) -> Reduction:
    """Read the reduction from options that a caller has set. Defaults mean nothing: Ray's allreduce writes its op into
    the options class, whose fresh instances then carry it."""
    return _reduction_of(options.reduceOp if options is not None else ReduceOp.SUM, tensor.dtype)


@cache  # it takes as long as a small sum
def _reduction_of(op: ReduceOp, dtype: torch.dtype | np.dtype) -> Reduction:
    if op not in _PLAIN:
        raise ConfigError(f"the collective got op={op!r}: expected one of {', '.join(each.name for each in _PLAIN)}.")
    if isinstance(dtype, torch.dtype):
        return reduction_of(_PLAIN[op], dtype)
    if dtype.kind == "c" and op in (ReduceOp.MIN, ReduceOp.MAX):
        raise ConfigError(f"the collective got op={op.name} for {dtype}: complex numbers have no order.")
    return _PLAIN[op]
