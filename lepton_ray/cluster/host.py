"""The process of a controller, which serves one job after another: starting a process takes a second of CPU time.

A handle names the process and one of its lives, so that nobody who still holds the handle of an ended job reaches the
next one. Only a life that ended well is followed by another; otherwise the process ends with it.
"""

from __future__ import annotations

import functools
import secrets
import sys
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from lepton_ray.cluster.controller import Controller
from lepton_ray.cluster.memory import forget, recall, remember
from lepton_ray.cluster.names import CONTROLLER_PREFIX, SERVICE
from lepton_ray.cluster.order import Order

RESTARTS = 20
"""How often Ray starts the process of a controller again, that died."""


class LifeOver(RayActorError):
    """The controller that is meant has ended, as if its process had."""

    def __init__(self) -> None:
        super().__init__(error_msg="this controller has ended; its process serves the next job")


class ControllerHost:
    """The actor."""

    def __init__(self) -> None:
        self._path = list(sys.path)
        # A process that takes the place of one that died goes on with what that had to do.
        kept = recall(_own_id())
        self._life = 0 if kept is None else kept[0]
        self._controller = self._new(None if kept is None else kept[1])

    def _new(self, order: Order | None = None) -> Controller:
        return Controller(self._handle(), self._end, functools.partial(remember, _own_id(), self._life), order)

    async def call(self, life: int, method: str, *args: Any) -> Any:
        """Call a method of the controller. Raises LifeOver for one that has ended."""
        if life != self._life:
            raise LifeOver
        return await getattr(self._controller, method)(*args)

    async def current(self) -> Handle:
        """Return the handle of the life that this process is in."""
        return self._handle()

    def _handle(self) -> Handle:
        return Handle(ray.get_runtime_context().current_actor, self._life)

    def _end(self, is_reusable: bool) -> Handle | None:
        """End this life; return the next one, which has no job yet. Unless this is reusable the process ends."""
        forget(_own_id())
        if not is_reusable:
            ray.kill(ray.get_runtime_context().current_actor)
            return None
        self._life += 1
        sys.path[:] = self._path
        self._controller = self._new()
        return self._handle()


@dataclass(frozen=True, slots=True)
class Handle:
    """A controller. Its methods are called as an actor's are: `handle.status.remote()`."""

    host: Any  # a Ray actor handle, which has no public type
    life: int

    def __getattr__(self, method: str) -> _Method:
        if method.startswith("_"):
            raise AttributeError(method)
        return _Method(self.host, self.life, method)

    def kill(self) -> None:
        """End the process. Only of a controller that nobody else can know to have moved on: a new or a spare one."""
        ray.kill(self.host)


@dataclass(frozen=True, slots=True)
class _Method:
    host: Any
    life: int
    name: str

    def remote(self, *args: Any) -> Any:
        return self.host.call.remote(self.life, self.name, *args)


def new_controller() -> Handle:
    """Start the process of a controller that has no job yet."""
    name = f"{CONTROLLER_PREFIX}{secrets.token_hex(6)}"
    options = {**SERVICE, "max_restarts": RESTARTS}
    return Handle(ray.remote(ControllerHost).options(name=name, **options).remote(), 0)


def _own_id() -> str:
    return str(ray.get_runtime_context().get_actor_id())
