"""Reach Ray: the cluster that we are in or were told of, otherwise a small one of our own."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import node, utils

from lepton_ray.cluster.names import NAMESPACE
from lepton_ray.errors import ConfigError
from lepton_ray.plan.types import Node

KNOCK_S = 5.0
"""How long a head may take to accept a connection."""


def connect(num_workers: int, cpus: float = 1, spare_cpus: int = 0) -> bool:
    """Make sure that this process talks to a Ray cluster; return whether it is one for this process alone.

    A Ray that is already initialised is used; then the one that RAY_ADDRESS names (Ray sets it for submitted jobs);
    otherwise a local one starts, with room for `num_workers` of `cpus` and `spare_cpus` more, whatever the machine has.
    It never joins another cluster that happens to run on this machine.
    """
    needed = math.ceil(num_workers * cpus) + spare_cpus
    if ray.is_initialized():
        _check_own(ray.get_runtime_context().gcs_address, needed)
        return False
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a notice on machines without GPU
    try:
        if address:
            _knock(address)
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
            return False
        room = max(os.cpu_count() or 1, needed)
        with _without_idle_services():
            ray.init(
                address="local",
                num_cpus=room,
                namespace=NAMESPACE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,  # a warning about the token of a cluster that nobody else will use
            )
        _own_rooms[ray.get_runtime_context().gcs_address] = room
        return True
    except (ConnectionError, RuntimeError) as error:
        where = f"RAY_ADDRESS={address}" if address else "a local Ray"
        raise ConfigError(f"cannot reach {where}: {error}") from error


_own_rooms: dict[str, int] = {}
"""CPUs of the Rays that this process has started, by address."""


def _check_own(address: str, needed: int) -> None:
    """Say what to do where an earlier, smaller trainer has started the Ray that this process is in."""
    if needed > _own_rooms.get(address, needed):
        raise ConfigError(
            f"this needs {needed} CPUs, and the local Ray that an earlier trainer of this process has started has "
            f"{_own_rooms[address]}. Call ray.shutdown() first (it ends what still runs there): the next one is larger."
        )


SPARED: Sequence[tuple[Any, str, Callable[..., Any]]] = (
    (node.Node, "start_monitor", lambda self: None),  # the autoscaler
    (node.Node, "start_log_monitor", lambda self: None),  # carries output to drivers, which we switch off
    (node.Node, "start_api_server", lambda self, **options: None),  # without a dashboard: usage statistics
    (utils, "get_dashboard_dependency_error", lambda: ImportError("not asked for")),  # imports a web server to find out
)
"""What Ray 2.60 starts or imports for a local cluster although nobody uses it, and what is done instead; there are no
public options for it. Together 4 s of CPU time, of which 2 s lie in the way of the first step, and 160 MB."""


@contextmanager
def _without_idle_services() -> Iterator[None]:
    """Let Ray start without the processes in SPARED; those that another version names differently start as usual."""
    usual = [(owner, name, getattr(owner, name)) for owner, name, _ in SPARED if hasattr(owner, name)]
    try:
        for owner, name, instead in SPARED:
            if hasattr(owner, name):
                setattr(owner, name, instead)
        yield
    finally:
        for owner, name, own in usual:
            setattr(owner, name, own)


def _knock(address: str) -> None:
    """Refuse an address where nobody listens: Ray itself would try for minutes. Raises ConnectionError."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return  # "auto", or an address that only Ray can read
    try:
        socket.create_connection((host, int(port)), KNOCK_S).close()
    except OSError as error:
        raise ConnectionError(
            f"nobody answers there ({error}). Is the cluster up? `ray start --head` prints its address"
        ) from error


def nodes() -> Sequence[Node]:
    """List the living nodes with all that they have."""
    return [Node(name=node["NodeManagerAddress"], total=node["Resources"]) for node in ray.nodes() if node["Alive"]]
