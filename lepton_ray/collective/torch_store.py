"""Bring the ranks of a torch process group together through the store that torch gives them.

Rank 0 makes the secret of the group. The keys live only while the group is being formed.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from lepton_ray.collective.group import Group
from lepton_ray.collective.mesh import Exchange
from lepton_ray.collective.post import Post
from lepton_ray.collective.tls import make_identity
from lepton_ray.errors import ConfigError, WaitTimeout

# Nobody has this address (RFC 5737), and nothing is sent to it: it only selects the way out of this machine.
_OUTSIDE = "192.0.2.1"
_SECRET_BYTES = 64  # in hexadecimal digits


def meet(
    store: dist.Store, rank: int, world: int, timeout_s: float, on_failure: Callable[[str], object], *, tls: bool
) -> tuple[Group, Post]:
    """Form the two parts of a process group. on_failure: as `Post`. Raises PeerLost, WaitTimeout or ConfigError.

    tls: whether to encrypt connections. What rank 0 says counts, but who asks for it takes part in no group without.
    """
    if rank == 0:
        store.set("secret", secrets.token_hex(_SECRET_BYTES // 2) + (make_identity().decode() if tls else ""))
    _await_keys(store, ["secret"], rank, timeout_s)
    known = bytes(store.get("secret"))
    secret, identity = known[:_SECRET_BYTES], known[_SECRET_BYTES:] or None
    if tls and identity is None:
        raise ConfigError(f"rank {rank} asks for TLS, and rank 0 does not. Call register(tls=True) in all processes.")
    host = _own_address(store)
    group = Group(rank, world, secret=_derive(secret, b"group"), timeout_s=timeout_s, host=host, identity=identity)
    post = Post(
        rank,
        world,
        secret=_derive(secret, b"post"),
        timeout_s=timeout_s,
        host=host,
        on_failure=on_failure,
        identity=identity,
    )
    try:
        group.form(_exchange(store, "group", rank, world, timeout_s))
        post.form(_exchange(store, "post", rank, world, timeout_s))
        if rank == 0:  # all have connected to us, so all have read all keys
            for key in ["secret", *(f"{part}/{peer}" for part in ("group", "post") for peer in range(world))]:
                store.delete_key(key)
        # Nobody goes on, and perhaps forms another group in this store, before the keys are gone.
        group.barrier()
    except BaseException:
        post.close()
        group.close()
        raise
    return group, post


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return hmac.digest(secret, purpose, "sha256")


def _exchange(store: dist.Store, part: str, rank: int, world: int, timeout_s: float) -> Exchange:
    def exchange(address: bytes) -> Sequence[bytes]:
        store.set(f"{part}/{rank}", address.decode())
        keys = [f"{part}/{peer}" for peer in range(world)]
        _await_keys(store, keys, rank, timeout_s)
        return [bytes(store.get(key)) for key in keys]

    return exchange


def _await_keys(store: dist.Store, keys: Sequence[str], rank: int, timeout_s: float) -> None:
    try:
        store.wait(list(keys), timedelta(seconds=timeout_s))
    except dist.DistStoreError as error:
        missing = [key for key in keys if not store.check([key])]
        raise WaitTimeout(
            f"rank {rank} waited {timeout_s:g} s for {', '.join(missing)} in the store of the process group. "
            "All its ranks must make it at the same time."
        ) from error


def _own_address(store: dist.Store) -> str:
    """Return the address of this machine that the other ranks can reach: that on the way to the store's server."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    server = store.host if isinstance(store, dist.TCPStore) else socket.gethostname()
    try:
        own = _address_towards(server)
        is_meant = server == "localhost" or server.startswith("127.") or server == "::1"
        if ipaddress.ip_address(own).is_loopback and not is_meant:
            # The server's machine may know its own name as a loopback address, which is of no use to others.
            own = _address_towards(_OUTSIDE)
    except OSError:
        return "127.0.0.1"
    return own


def _address_towards(host: str) -> str:
    family, kind, protocol, _, target = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
