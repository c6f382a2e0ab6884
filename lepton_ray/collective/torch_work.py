"""What a torch process group hands out: works, done one after the other in the order in which they were issued.

Whoever will wait at once (torch says so) needs no thread: its operation runs where it was called, unless others are
still ahead of it. All other operations run on a thread of the group, so that a backward goes on meanwhile.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.futures import Future

from lepton_ray.errors import PeerLost, WaitTimeout

_asking = threading.Lock()  # for futures: held for moments, so one serves all works


class TorchPeerLost(PeerLost, dist.DistNetworkError):
    """A `PeerLost` that is also what torch's own backends raise, a RuntimeError: programs catch that."""


class TorchWaitTimeout(WaitTimeout, dist.DistBackendError):
    """Likewise for `WaitTimeout`."""


class Work(dist.Work):
    """One operation. `finish` is called once, by whoever carried it out."""

    def __init__(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        """tensors: what the operation writes; the value of its future."""
        super().__init__()
        self._name, self._tensors = name, list(tensors)
        self._error: BaseException | None = None
        self._source, self._is_done = -1, False
        self._ending = threading.Lock()  # until it is done. An Event takes several times as long to make
        self._ending.acquire()
        self._begun: Future[None] | None = None
        self._future: Future[list[torch.Tensor]] | None = None

    def finish(self, error: BaseException | None = None, source: int = -1) -> None:
        """Say how it ended. source: the rank that a message came from."""
        self._error, self._source = _as_torch_has_it(error), source
        with _asking:
            self._is_done, begun = True, self._begun
        self._ending.release()
        if begun is not None:
            begun.set_result(None)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return when it is done; raise what went wrong. timeout: 0 is for ever; the group's own limit holds anyway."""
        if not self._is_done:
            if not self._ending.acquire(timeout=timeout.total_seconds() or -1):
                raise TorchWaitTimeout(f"{self._name} is not done after the timeout of {timeout.total_seconds():g} s")
            self._ending.release()
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._is_done

    def is_success(self) -> bool:
        return self._is_done and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return self._tensors

    def source_rank(self) -> int:
        return self._source

    _source_rank = source_rank

    def get_future(self) -> Future[list[torch.Tensor]]:
        """Return a future of the tensors. Its error is a RuntimeError with the text of ours: C++ knows no other.

        It is raised by a callback, since an error that is set on a future of Python is a plain value to C++, where
        DDP waits for it (torch 2.13).
        """
        with _asking:
            if self._future is None:
                self._begun = Future()
                self._future = self._begun.then(self._outcome)
                if self._is_done:
                    self._begun.set_result(None)
            return self._future

    def _outcome(self, _: Future[None]) -> list[torch.Tensor]:
        if self._error is not None:
            raise self._error
        return self._tensors


class Turns:
    """Carries out works one at a time, in the order in which they are issued from any thread."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Work, Callable[[], object]]] = deque()
        self._is_closed = False
        self._busy: int | None = None
        """The thread that carries out a work now."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def issue(self, work: Work, act: Callable[[], object], *, at_once: bool) -> None:
        """Carry out a work by calling `act`. at_once: the caller will wait for it before it does anything else.

        What a callback of a work's future issues comes right after that work, on all ranks: the callback may wait for
        it, as some hooks of DDP do, and nothing else goes on before it returns.
        """
        own = threading.get_ident()
        with self._changed:
            if self._is_closed:
                raise TorchPeerLost("the process group was destroyed")
            is_nested = self._busy == own
            if not is_nested and (not at_once or self._waiting or self._busy is not None):
                self._waiting.append((work, act))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._serve, daemon=True, name="lepton-collective")
                    self._thread.start()
                self._changed.notify_all()
                return
            self._busy = own
        try:
            _carry_out(work, act)
        finally:
            if not is_nested:
                with self._changed:
                    self._busy = None
                    self._changed.notify_all()

    def close(self, limit_s: float | None = None) -> None:
        """Take no more works, and return when those that were issued are done, or after `limit_s`."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            if self._thread is not threading.current_thread():
                self._changed.wait_for(lambda: not self._waiting and self._busy is None, limit_s)

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._busy is None and (self._waiting or self._is_closed))
                if not self._waiting:
                    return
                work, act = self._waiting.popleft()
                self._busy = threading.get_ident()
            _carry_out(work, act)
            del work, act  # a sleeping thread must not keep tensors alive
            with self._changed:
                self._busy = None
                self._changed.notify_all()


def _carry_out(work: Work, act: Callable[[], object]) -> None:
    try:
        act()
    except BaseException as error:  # noqa: BLE001 - it is raised where the work is waited for
        work.finish(error)
    else:
        work.finish()


def _as_torch_has_it(error: BaseException | None) -> BaseException | None:
    """Turn an error of the transport into one that is also torch's."""
    if isinstance(error, PeerLost):
        translated: Exception = TorchPeerLost(str(error))
    elif isinstance(error, WaitTimeout):
        translated = TorchWaitTimeout(f"{error} (the timeout of the process group)")
    else:
        return error
    translated.__cause__ = error
    return translated
