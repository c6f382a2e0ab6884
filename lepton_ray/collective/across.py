"""Operations of a group whose ranks are on several nodes, each of whose ranks may share memory.

Every rank of a node drives the network: it reduces its share of the node's arrays and passes it along a row of the
ranks that have the same place on other nodes. Where nodes have different numbers of ranks, only as many share as each
node has. Arrays that are small for the network go another way, see `plan.transport`: each node sums, and each rank gets
the sums of the other nodes from one rank there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lepton_ray.collective.calls import SUM, Array, Reduction
from lepton_ray.collective.layout import even_parts
from lepton_ray.collective.mesh import Mesh
from lepton_ray.collective.row import ALONE, Expect, Lossy, Row
from lepton_ray.collective.shm import SharedMemory
from lepton_ray.collective.wire import CODECS, Floats
from lepton_ray.plan.ring import all_gather, reduce_scatter
from lepton_ray.plan.transport import Route, Wire

Exchange = Callable[[bytes, Array, Reduction, Sequence[int], Sequence[int]], None]
"""Sends a small array to some ranks, and reduces those of some ranks: header, array, op, targets, sources."""


class Across:
    """The operations of one rank. Errors are final; they are those of `Ring`, with the header all ranks must show."""

    def __init__(
        self,
        mesh: Mesh,
        expect: Expect,
        exchange: Exchange,
        nodes: Sequence[Sequence[int]],
        shared: SharedMemory | None,
    ) -> None:
        """nodes: their ranks. shared: between those of the own node; None where there is one."""
        self._exchange, self.shared = exchange, shared
        mine = next(node for node in nodes if mesh.rank in node)
        place = mine.index(mesh.rank)
        self._nodes, self._mine, self._place = nodes, mine, place
        self.counts = tuple(map(len, nodes))
        """Ranks of each node."""
        self.sharing = min(self.counts)
        """Ranks of each node that drive the network."""
        self.row = Row(mesh, [rank for node in nodes for rank in node], expect)
        """All ranks, node by node: so an array that goes along it crosses the network once between two nodes."""
        self.lane = Row(mesh, [node[place] for node in nodes], expect) if place < self.sharing else None
        """One rank of each node; None where there are not as many."""
        self._sources = [node[place % len(node)] for node in nodes]
        self._targets = [
            rank for node in nodes if node is not mine for at, rank in enumerate(node) if at % len(mine) == place
        ]
        self._lossy = {wire: Lossy(make()) for wire, make in CODECS.items()}

    @property
    def is_even(self) -> bool:
        """Say whether all nodes are alike, so that results which lie on different ranks need no detour."""
        return self.shared is not None and self.shared.can_read and len(set(self.counts)) == 1

    def barrier(self, header: bytes) -> None:
        if self.shared is not None:
            self.shared.barrier(header)
        self._exchange(header, np.empty(0, np.uint8), SUM, self._targets, self._sources)

    def allreduce(
        self, header: bytes, array: Array, op: Reduction, route: Route, wire: Wire, lost: Floats | None
    ) -> None:
        """Reduce along a route. wire, lost (see `Lossy`): of an array of float32, on the route that is for such."""
        if route is Route.EXCHANGE:
            if self.shared is not None:
                self.shared.allreduce(header, array, op)
            self._exchange(header, array, op, self._targets, self._sources)
            return
        if route is Route.FLAT:
            self.row.allreduce(header, array, slice(0, array.size), op)
            return
        bounds = even_parts(array.size, self.sharing, array.itemsize)
        bounds += (array.size,) * (len(self._mine) - self.sharing)
        opened = None if self.shared is None else self.shared.open(header, array, bounds, op)
        if self.lane is not None:
            lossy = self._lossy.get(wire)
            if lossy is not None:
                lossy.lost = lost
            self.lane.allreduce(
                header,
                array,
                slice(bounds[self._place], bounds[self._place + 1]),
                op,
                is_scattered=route is Route.SCATTER,
                local=opened or ALONE,
                lossy=lossy,
            )
        if opened is not None:
            opened.close()

    def reducescatter(self, header: bytes, array: Array, bounds: Sequence[int], op: Reduction) -> None:
        """Reduce within `array` what lies between the bounds of this rank, if nodes are even."""
        assert self.shared is not None
        assert self.lane is not None
        opened = self.shared.open(header, array, None, op, is_spread=False)
        chunks = [slice(bounds[rank], bounds[rank + 1]) for rank in self.lane.ranks]
        moves = reduce_scatter(self.lane.position, len(chunks))
        self.lane.circulate(header, array, chunks, moves, len(moves), op, opened)
        opened.close()

    def allgather(self, header: bytes, rows: Array) -> None:
        """Fill `rows` from the ranks' own rows, if nodes are even and `rows` is not small."""
        assert self.shared is not None
        lane = self.lane
        assert lane is not None
        count = rows.shape[1]
        chunks = [slice(rank * count, (rank + 1) * count) for rank in lane.ranks]
        moves = all_gather(lane.position, len(chunks))
        owners = [[node[place] for node in self._nodes] for place in range(self.sharing)]
        self.shared.fetch_rows(
            header, rows, owners, lambda: lane.circulate(header, rows.reshape(-1), chunks, moves, 0, SUM)
        )
