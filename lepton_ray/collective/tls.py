"""Encrypt the connections of a group, with a key and a certificate that are made for it and known to its ranks alone.

All ranks have the same certificate, and take no other: who shows it and has its key is one of them. TLS 1.3 only.
The session works on bytes and not on the socket, which stays an ordinary one: whoever ends a group may shut it down at
any moment, and nobody takes encrypted bytes for data.
"""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import time

from lepton_ray.collective.links import Link
from lepton_ray.errors import ConfigError, PeerLost

# Encrypted at once; a record has at most 16 KB.
_CHUNK_BYTES = 256 << 10
_NAME = "lepton_ray group"
_VALID = datetime.timedelta(days=3650)  # the group ends before


def make_identity() -> bytes:
    """Make a key and its certificate, as PEM. Raises ConfigError without the package for it."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ConfigError(
            "tls=True needs the package cryptography. Install it: pip install 'lepton-ray[tls]'."
        ) from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _NAME)])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _VALID)  # clocks differ
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    return key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + certificate.public_bytes(pem)


class Tls:
    """Makes links of connections, both of whose ends have this identity."""

    def __init__(self, identity: bytes) -> None:
        certificate = identity[identity.index(b"-----BEGIN CERTIFICATE") :].decode()
        descriptor = os.memfd_create("lepton_ray", os.MFD_CLOEXEC)  # ssl takes a key from files only
        try:
            os.write(descriptor, identity)
            self._contexts = [
                _context(protocol, f"/proc/self/fd/{descriptor}", certificate)
                for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER)
            ]
        finally:
            os.close(descriptor)

    def seal(self, peer: int, connection: socket.socket, *, is_server: bool, deadline_s: float) -> Link:
        """Shake hands with a peer that does the same. Raises PeerLost or TimeoutError."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = self._contexts[is_server].wrap_bio(incoming, outgoing, server_side=is_server)
        try:
            while True:
                connection.settimeout(max(0.001, deadline_s - time.monotonic()))
                try:
                    session.do_handshake()
                except ssl.SSLWantReadError:
                    connection.sendall(outgoing.read())
                    received = connection.recv(_CHUNK_BYTES)
                    if not received:
                        raise PeerLost(f"rank {peer} closed its connection") from None
                    incoming.write(received)
                else:
                    connection.sendall(outgoing.read())
                    return SealedLink(peer, connection, session, incoming, outgoing)
        except ssl.SSLError as error:
            raise PeerLost(f"rank {peer} does not prove that it is one of this group ({error.reason})") from error


class SealedLink(Link):
    """The encrypted connection to one peer."""

    __slots__ = ("_incoming", "_is_full", "_outgoing", "_promised", "_sealed", "_session")

    def __init__(
        self,
        peer: int,
        connection: socket.socket,
        session: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
    ) -> None:
        super().__init__(peer, connection)
        self._session, self._incoming, self._outgoing = session, incoming, outgoing
        self._is_full = incoming.pending > 0
        self._sealed = memoryview(b"")
        """Encrypted, and not taken by the kernel yet."""
        self._promised = 0
        """Bytes that are in it. The caller has not been told yet that they are sent, and comes with them again."""

    @property
    def has_unread(self) -> bool:
        return self._is_full and (self._session.pending() > 0 or self._incoming.pending > 0)

    def receive(self, view: memoryview) -> int:
        """Receive what is there, so that nothing is left of which the kernel knows no more, or `view` is full."""
        total = 0
        try:
            while total < len(view):
                try:
                    count = self._session.read(len(view) - total, view[total:])
                except ssl.SSLWantReadError:
                    received = self.socket.recv(_CHUNK_BYTES)
                    if not received:
                        raise PeerLost(f"rank {self.peer} closed its connection") from None
                    self._incoming.write(received)
                    continue
                if not count:
                    raise PeerLost(f"rank {self.peer} closed its connection")
                total += int(count)
        except BlockingIOError:
            self._is_full = False
            return total
        except OSError as error:  # one of TLS is one of these
            if isinstance(error, PeerLost):
                raise
            raise self.lost(error) from error
        self._is_full = True
        return total

    def send(self, *views: bytes | memoryview) -> int:
        """Send what the kernel takes, and encrypt a little more; return the number of bytes that it has all of."""
        if self._promised:
            if not self._push():
                return 0
            sent, self._promised = self._promised, 0
            return sent
        total = 0
        for each in views:
            view = memoryview(each)
            for start in range(0, len(view), _CHUNK_BYTES):
                self._promised = self._session.write(view[start : start + _CHUNK_BYTES])
                self._sealed = memoryview(self._outgoing.read())
                if not self._push():
                    return total
                total, self._promised = total + self._promised, 0
        return total

    def _push(self) -> bool:
        """Send what is encrypted; return whether the kernel took all of it."""
        try:
            while self._sealed:
                self._sealed = self._sealed[self.socket.send(self._sealed) :]
        except BlockingIOError:
            return False
        except OSError as error:
            raise self.lost(error) from error
        return True


def _context(protocol: int, path: str, certificate: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # ranks are known by their key
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certificate)
    context.load_cert_chain(path)
    return context
