"""A group of processes that takes the fastest way between them that works: shared memory within nodes, else TCP.

Nothing is configured: who shares memory is probed, what is between nodes is measured, and all ranks decide alike. TCP
connections between all stay for messages between two ranks, and as a second witness of anybody's death.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import numpy as np
from numpy.typing import DTypeLike

from lepton_ray.collective import shm
from lepton_ray.collective.across import Across
from lepton_ray.collective.calls import (
    ALLGATHER,
    ALLREDUCE,
    BARRIER,
    BOR,
    BROADCAST,
    REDUCE,
    REDUCE_SCATTER,
    SUM,
    Array,
    Reduction,
    check_rows,
)
from lepton_ray.collective.holdings import HEAP
from lepton_ray.collective.layout import cut
from lepton_ray.collective.measure import measure
from lepton_ray.collective.memory import copy
from lepton_ray.collective.mesh import Exchange
from lepton_ray.collective.probe import probe
from lepton_ray.collective.ring import Ring
from lepton_ray.collective.shm import SharedMemory
from lepton_ray.collective.wire import Feedback
from lepton_ray.errors import ConfigError
from lepton_ray.plan.ring import chunk_bounds
from lepton_ray.plan.transport import Route, Speeds, Wire, choose, explain, goes_straight, lossy_route

_WIRES = [wire.value for wire in Wire]
_AUTO = "auto"


class Group(Ring):
    """A `Ring` that goes through shared memory between ranks that can reach each other's.

    node: ranks with different ones are on different nodes, even if they could share memory.
    """

    _shared: SharedMemory | None = None
    """Between all ranks."""
    _across: Across | None = None
    """Where there are several nodes."""
    _speeds: Speeds | None = None

    def __init__(
        self,
        rank: int,
        world: int,
        *,
        secret: bytes,
        timeout_s: float = 60,
        host: str = "127.0.0.1",
        identity: bytes | None = None,
        node: str = "",
    ) -> None:
        super().__init__(rank, world, secret=secret, timeout_s=timeout_s, host=host, identity=identity)
        self._node = node

    def form(self, exchange: Exchange) -> None:
        super().form(exchange)
        if self.world > 1:
            try:
                self._explore()
                self._calls = 0  # those of the user are counted
            except BaseException as error:
                self._mesh.end(f"the group could not be formed: {error}")
                self._mesh.release()
                raise

    def _explore(self) -> None:
        """Agree with all ranks on who shares memory, and on what is between those who do not."""
        allgather = super().allgather
        found = probe(self.rank, self._node, allgather, timeout_s=self.timeout_s, watch=self._mesh.look)
        if found.shared is not None:
            self._mesh.attach(found.shared.board.end, found.shared.release)
        if len(found.nodes) == 1:
            self._shared = found.shared
            return
        self._across = Across(self._mesh, self._expect, self._exchange, found.nodes, found.shared)
        self._row = self._across.row
        self._speeds = measure(self._mesh, self._across, allgather, partial(self._attempt, self._across))

    def _attempt(self, across: Across, route: Route) -> None:
        """Sum next to nothing."""
        array = np.zeros(1, np.float32)
        with self._operation(ALLREDUCE, array, op=SUM) as header:
            across.allreduce(header, array, SUM, route, Wire.FP32, None)

    @property
    def transport(self) -> str:
        """Say how arrays travel: "shared memory", "tcp", both, or "none" in a group of one."""
        if self.world == 1:
            return "none"
        if self._shared is not None:
            return "shared memory"
        return "tcp" if self._across is None or max(self._across.counts) == 1 else "shared memory and tcp"

    @property
    def is_in_one_node(self) -> bool:
        """All ranks share memory."""
        return self._shared is not None

    def explain(self, size_bytes: int) -> str:
        """Say how an array of this size is summed, and why: what was measured, and predicted for each candidate."""
        if self._across is None or self._speeds is None:
            return f"{size_bytes} bytes between {self.world} ranks of one node: {self.transport}"
        return explain(choose(size_bytes, self._across.counts, self._speeds))

    def limit(self, timeout_s: float) -> None:
        super().limit(timeout_s)
        if self._memory is not None:
            self._memory.board.timeout_s = timeout_s

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike = np.float32) -> Array:
        """Make an array, in the group's memory where it has one. Its values are undefined.

        Arrays in the group's memory are reduced in place, without a copy. When the group has failed, a rank that does
        not know it yet may still write into them: make new ones in the next group.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        if self._memory is None:
            return np.empty(shape, dtype)
        return HEAP.empty(prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def allreduce(
        self, array: Array, op: Reduction = SUM, wire: str = Wire.FP32.value, feedback: Feedback | None = None
    ) -> None:
        """Reduce `array` over all ranks into every rank's `array`.

        wire: what a sum of float32 becomes between nodes: "fp32" as it is, "bf16", "int8", or "auto" for what pays, by
        the measured speeds. Anything else travels as it is, and so does all within a node.
        feedback: gives back to the next sum of the same buffer what a lossy format took from this one.
        """
        if wire not in _WIRES and wire != _AUTO:
            raise ConfigError(f"allreduce got wire={wire!r}: expected one of {', '.join([*_WIRES, _AUTO])}.")
        if self._shared is not None:
            with self._operation(ALLREDUCE, array, op=op) as header:
                self._shared.allreduce(header, array, op)
            return
        if self._across is None or self._speeds is None:
            super().allreduce(array, op)
            return
        choice, sent = choose(array.nbytes, self._across.counts, self._speeds), Wire.FP32
        if op.code == SUM.code and array.dtype == np.float32:
            sent = choice.wire if wire == _AUTO else Wire(wire)
        route = choice.route if sent is Wire.FP32 else lossy_route(self._across.counts)
        lost = None if feedback is None or sent is Wire.FP32 else feedback.of(array.size)
        with self._operation(ALLREDUCE, array, op=op, wire=_WIRES.index(sent.value)) as header:
            self._across.allreduce(header, array, op, route, sent, lost)

    def allgather(self, array: Array) -> Array:
        size_bytes = array.nbytes * self.world
        if self._across is not None and self._across.is_even and size_bytes > shm.COPY_BYTES:
            with self._operation(ALLGATHER, array) as header:
                rows = np.empty((self.world, array.size), array.dtype)
                rows[self.rank] = array
                self._across.allgather(header, rows)
                return rows
        if self._shared is None:
            return super().allgather(array)
        rows = np.empty((self.world, array.size), array.dtype)
        self.allgather_into(list(rows), array)
        return rows

    def allgather_into(self, rows: Sequence[Array], array: Array) -> None:
        if self._shared is None:
            super().allgather_into(rows, array)
            return
        check_rows(ALLGATHER, self.world, rows, array)
        with self._operation(ALLGATHER, array) as header:
            self._shared.allgather(header, array, rows)

    def reducescatter(self, array: Array, op: Reduction = SUM) -> Array:
        if self._shared is None and (self._across is None or not self._across.is_even):
            return super().reducescatter(array, op)
        bounds = chunk_bounds(array.size, self.world)
        own = array[bounds[self.rank] : bounds[self.rank + 1]]
        with self._operation(REDUCE_SCATTER, array, op=op) as header:
            if self._shared is not None:
                self._shared.reducescatter(header, cut(array, bounds), own, op)
            elif self._across is not None:
                self._across.reducescatter(header, array, bounds, op)
        return own

    def reducescatter_into(self, out: Array, parts: Sequence[Array], op: Reduction = SUM) -> None:
        if self._shared is None:
            super().reducescatter_into(out, parts, op)
            return
        check_rows(REDUCE_SCATTER, self.world, parts, out)
        with self._operation(REDUCE_SCATTER, out, op=op, count=out.size * self.world) as header:
            self._shared.reducescatter(header, parts, out, op)

    def broadcast(self, array: Array, root: int = 0) -> None:
        if self._goes_straight(array):
            with self._operation(BROADCAST, array, root=root) as header:
                # Bytes of everybody, of which all but those of the root are zero.
                joined = np.zeros(array.nbytes, np.uint8)
                if self.rank == root:
                    copy(array, joined)
                self._exchange_nodes(header, joined, BOR)
                if self.rank != root:
                    copy(joined, array)
            return
        if self._shared is None:
            super().broadcast(array, root)
            return
        with self._operation(BROADCAST, array, root=root) as header:
            self._shared.broadcast(header, array, root)

    def reduce(self, array: Array, root: int = 0, op: Reduction = SUM) -> None:
        if self._goes_straight(array):
            with self._operation(REDUCE, array, root=root, op=op) as header:
                total = array.copy()
                self._exchange_nodes(header, total, op)
                if self.rank == root:
                    copy(total, array)
            return
        if self._shared is None:
            super().reduce(array, root, op)
            return
        with self._operation(REDUCE, array, root=root, op=op) as header:
            self._shared.reduce(header, array, root, op)

    def _goes_straight(self, array: Array) -> bool:
        if self._across is None or self._speeds is None:
            return False
        return goes_straight(array.nbytes, self._across.counts, self._speeds)

    def _exchange_nodes(self, header: bytes, array: Array, op: Reduction) -> None:
        assert self._across is not None
        self._across.allreduce(header, array, op, Route.EXCHANGE, Wire.FP32, None)

    def barrier(self) -> None:
        if self._shared is None and self._across is None:
            super().barrier()
            return
        nothing = np.empty(0, np.uint8)
        with self._operation(BARRIER, nothing) as header:
            if self._shared is not None:
                self._shared.barrier(header)
            elif self._across is not None:
                self._across.barrier(header)

    def _say_goodbye(self) -> None:
        if self._memory is not None:
            self._memory.board.leave()
        super()._say_goodbye()

    @property
    def _memory(self) -> SharedMemory | None:
        """What is shared with other ranks of this node."""
        return self._shared if self._across is None else self._across.shared
