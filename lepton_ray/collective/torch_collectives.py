"""Make torch's collectives, on tensors, of what a `Group` and a `Post` can do with arrays.

Functions here run when it is their turn, perhaps on another thread than the caller's. What a caller can get wrong on
its own has been checked before, with `torch_input`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_ray.collective.calls import Array
from lepton_ray.collective.group import Group
from lepton_ray.collective.post import Done, Post
from lepton_ray.collective.tensors import flat
from lepton_ray.collective.torch_input import Reducing
from lepton_ray.errors import ConfigError, LeptonError, WaitTimeout

Tensor = torch.Tensor
Sides = Sequence[NDArray[np.uint8] | None]
"""What goes to each rank, or where it goes to that comes from each."""

EXCHANGES = ("gather", "scatter", "all_to_all")
GATHER, SCATTER, ALL_TO_ALL = range(3)

# Torch's own tags have 32 bits, and ours are beyond.
_EXCHANGE_TAG, _ROLL_CALL_TAG = 1 << 40, 2 << 40
_NOTHING = memoryview(b"")
_TOGETHER_BYTES = 16 << 10


def allreduce(group: Group, tensor: Tensor, op: Reducing) -> None:
    if tensor.is_sparse:
        _allreduce_sparse(group, tensor)
    else:
        array, finish = flat(tensor)
        group.allreduce(array, op.how)
        finish()
    _average(group, tensor, op)


def _allreduce_sparse(group: Group, tensor: Tensor) -> None:
    """Sum by putting all entries of all ranks side by side, filled up to the largest number of them."""
    own = tensor.detach().coalesce()
    indices, values = own.indices(), own.values()
    counts = group.allgather(np.array([indices.shape[1]]))[:, 0]
    most = int(counts.max())
    all_indices = _gather_rows(group, _filled_up(indices.t(), most))
    all_values = _gather_rows(group, _filled_up(values, most))
    joined = torch.sparse_coo_tensor(
        torch.cat([rows[:count] for rows, count in zip(all_indices, counts)]).t(),
        torch.cat([rows[:count] for rows, count in zip(all_values, counts)]),
        own.shape,
    )
    with torch.no_grad():  # what detach() gives shares no entries
        tensor.copy_(joined.coalesce())


def _filled_up(rows: Tensor, count: int) -> Tensor:
    filled = rows.new_zeros(count, *rows.shape[1:])
    filled[: rows.shape[0]] = rows
    return filled


def _gather_rows(group: Group, tensor: Tensor) -> Tensor:
    output = tensor.new_empty(group.world, *tensor.shape)
    allgather_single(group, output, tensor)
    return output


def reduce(group: Group, tensor: Tensor, root: int, op: Reducing) -> None:
    array, finish = flat(tensor, is_written=group.rank == root)
    group.reduce(array, root, op.how)
    finish()
    if group.rank == root:
        _average(group, tensor, op)


def broadcast(group: Group, tensor: Tensor, root: int) -> None:
    array, finish = flat(tensor, is_written=group.rank != root)
    group.broadcast(array, root)
    finish()


def allgather(group: Group, outputs: Sequence[Tensor], tensor: Tensor) -> None:
    targets = [flat(output) for output in outputs]
    group.allgather_into([target for target, _ in targets], flat(tensor, is_written=False)[0])
    for _, finish in targets:
        finish()


def allgather_single(group: Group, output: Tensor, tensor: Tensor) -> None:
    target, finish = flat(output)
    group.allgather_into(list(target.reshape(group.world, -1)), flat(tensor, is_written=False)[0])
    finish()


def reduce_scatter(group: Group, output: Tensor, inputs: Sequence[Tensor], op: Reducing) -> None:
    _reduce_scatter(group, output, [flat(each, is_written=False)[0] for each in inputs], op)


def reduce_scatter_single(group: Group, output: Tensor, tensor: Tensor, op: Reducing) -> None:
    parts = flat(tensor, is_written=False)[0].reshape(group.world, -1)
    _reduce_scatter(group, output, list(parts), op)


def _reduce_scatter(group: Group, output: Tensor, parts: Sequence[Array], op: Reducing) -> None:
    target, finish = flat(output)
    group.reducescatter_into(target, parts, op.how)
    finish()
    _average(group, output, op)


def exchange(
    group: Group, post: Post, call: int, root: int, outgoing: Sequence[Tensor | None], incoming: Sequence[Tensor | None]
) -> None:
    """Send to each rank, and receive from each, what the lists hold for it: gather, scatter, all-to-all.

    call, root: must be the same on all ranks, and so must be the sizes at both ends of each message.
    """
    sends = [None if each is None else _bytes_of(flat(each, is_written=False)[0]) for each in outgoing]
    receives = [None if each is None else flat(each) for each in incoming]
    places = [None if each is None else _bytes_of(each[0]) for each in receives]
    sizes = _agree(group, call, root, sends, places)
    if sizes.sum(1).max() <= _TOGETHER_BYTES:
        _exchange_together(group, sizes, sends, places)
    else:
        _exchange_one_by_one(group, post, sends, places)
    for received in receives:
        if received is not None:
            received[1]()


def _exchange_together(group: Group, sizes: NDArray[np.int64], sends: Sides, places: Sides) -> None:
    """Show everything to everybody: of little, that is sooner done than telling each rank its part."""
    own = np.zeros(sizes.sum(1).max(), np.uint8)
    starts = sizes.cumsum(1) - sizes
    for peer, going in enumerate(sends):
        if going is not None:
            own[starts[group.rank, peer] :][: going.size] = going
    rows = group.allgather(own)
    for peer, place in enumerate(places):
        if place is not None:
            place[:] = rows[peer, starts[peer, group.rank] :][: place.size]


def _exchange_one_by_one(group: Group, post: Post, sends: Sides, places: Sides) -> None:
    own, place = sends[group.rank], places[group.rank]
    if own is not None and place is not None:
        place[:] = own
    others = [(group.rank + step) % group.world for step in range(1, group.world)]  # everybody begins with another one
    messages = [partial(post.receive, memoryview(each), peer) for peer in others if (each := places[peer]) is not None]
    messages += [partial(post.send, memoryview(each), peer) for peer in others if (each := sends[peer]) is not None]
    await_all([partial(message, _EXCHANGE_TAG, timeout_s=group.timeout_s) for message in messages])


def await_all(messages: Sequence[Callable[[Done], object]]) -> None:
    """Start messages, each by calling it with what is to be told of its end, and return when all have ended well."""
    ended: SimpleQueue[LeptonError | None] = SimpleQueue()
    for message in messages:
        message(lambda error, _: ended.put(error))
    for _ in messages:
        error = ended.get()
        if error is not None:
            raise error


def call_roll(post: Post, limit_s: float) -> None:
    """Return when all ranks have called this. Rank 0 names in its error all that have not."""
    if post.rank:
        await_all([partial(post.send, _NOTHING, 0, _ROLL_CALL_TAG, timeout_s=limit_s)])
        await_all([partial(post.receive, _NOTHING, 0, _ROLL_CALL_TAG, timeout_s=limit_s)])
        return
    missing = set(range(1, post.world))
    others = sorted(missing)

    def hear(peer: int, done: Done) -> None:
        def heard(error: LeptonError | None, peer: int) -> None:
            missing.discard(peer if error is None else 0)
            done(error, peer)

        post.receive(_NOTHING, peer, _ROLL_CALL_TAG, heard, limit_s)

    try:
        await_all([partial(hear, peer) for peer in others])
    except WaitTimeout as error:
        ranks = ", ".join(map(str, sorted(missing)))
        raise WaitTimeout(f"rank(s) {ranks} did not come to the monitored barrier within {limit_s:g} s") from error
    await_all([partial(post.send, _NOTHING, peer, _ROLL_CALL_TAG, timeout_s=limit_s) for peer in others])


def _agree(group: Group, call: int, root: int, sends: Sides, places: Sides) -> NDArray[np.int64]:
    """Check that all ranks make the same exchange and expect what is sent. Raises ConfigError on every rank if not.

    Returns the sizes in bytes, by sender and receiver.
    """
    sizes = [[-1 if each is None else each.nbytes for each in side] for side in (sends, places)]
    rows = group.allgather(np.array([call, root, *sizes[0], *sizes[1]], np.int64))
    sent, expected = rows[:, 2 : 2 + group.world], rows[:, 2 + group.world :]
    for rank, row in enumerate(rows):
        if tuple(row[:2]) != (call, root):
            raise ConfigError(
                f"rank {group.rank} calls {EXCHANGES[call]} with root {root}, and rank {rank} calls "
                f"{EXCHANGES[row[0]]} with root {row[1]}. All ranks must make the same calls in the same order."
            )
    for sender, receiver in np.argwhere(sent != expected.T):
        raise ConfigError(
            f"{EXCHANGES[call]}: rank {sender} sends {sent[sender, receiver]} bytes to rank {receiver}, which expects "
            f"{expected[receiver, sender]}. Both must name tensors of equal size and dtype."
        )
    return sent.clip(0)


def _average(group: Group, tensor: Tensor, op: Reducing) -> None:
    if op.is_mean:
        tensor.detach().div_(group.world)


def _bytes_of(array: Array) -> NDArray[np.uint8]:
    """Numpy copies dtypes of its users, such as our bfloat16, field by field. Bytes it copies at once."""
    return array.view(np.uint8)
