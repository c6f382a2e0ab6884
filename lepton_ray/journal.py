"""The journal of a run: append-only JSON lines, the one account of what happened.

A run has one writer at a time, but several in its life (driver, controllers, resumes). Each opens a segment of its own,
journal-00001.jsonl, journal-00002.jsonl, ..., so that nobody ever writes behind a line that a killed writer left torn.
On a disk every append reaches the operating system at once. Behind a URL, where nothing can be appended, the
current segment is put again at most once in `PUT_EVERY_S`, and when the journal is closed.

The JSON is Python's: NaN, Infinity and -Infinity stand for themselves and come back as floats.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum

from lepton_ray.errors import LeptonError
from lepton_ray.storage import Folder

log = logging.getLogger(__name__)

PUT_EVERY_S = 1.0
SEGMENT_BYTES = 1 << 20
HELD_BYTES = 16 << 20  # lines that wait for a full or broken disk; more is an error

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of a disk that has no room; what is open stays so."""

_SEGMENT = re.compile(r"journal-(\d{5,})\.jsonl")


def _plain(value: object) -> object:
    """Find JSON for what JSON does not know. Never raises: a journal takes what it is given."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    tolist = getattr(value, "tolist", None)  # numpy scalars and arrays, torch tensors
    if callable(tolist):
        try:
            return tolist()
        except (TypeError, ValueError, RuntimeError):
            return repr(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value)


def _with_plain_keys(value: object) -> object:
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): _with_plain_keys(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_plain_keys(item) for item in value]
    return value


_encode = json.JSONEncoder(separators=(",", ":"), default=_plain).encode


def _line(record: Mapping[str, object]) -> bytes:
    try:
        return _encode(record).encode() + b"\n"
    except TypeError:  # a key that JSON does not know, such as a numpy integer
        return _encode(_with_plain_keys(record)).encode() + b"\n"


class Journal:
    """One writer's life. Opens its segment at the first append; thread-safe."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._held: list[bytes] = []  # not written yet; behind a URL: all lines of the current segment
        self._held_bytes = 0
        self._segment = ""  # "": the next write opens one
        self._file = -1
        self._file_bytes = 0
        self._is_stale = False  # behind a URL: the segment there lacks lines
        self._timer: threading.Timer | None = None
        self._put_lock = threading.Lock()

    def append(self, kind: str, /, **fields: object) -> dict[str, object]:
        """Write {"t": seconds since 1970, "event": kind, **fields}; return it."""
        record: dict[str, object] = {"t": time.time(), "event": kind, **fields}
        self.append_many([record])
        return record

    def append_many(self, records: Iterable[Mapping[str, object]]) -> None:
        """Write records that have their "event" already; "t" is added to those that have none.

        A failing disk does not raise: the lines are held and tried again with the next append. Raises OSError
        when too many are held, as `close` does for any.
        """
        now = {"t": time.time()}
        lines = [_line(record if "t" in record else {**now, **record}) for record in records]
        with self._lock:
            self._held += lines
            self._held_bytes += sum(map(len, lines))
            if not self.folder.is_local:
                if self._held_bytes > HELD_BYTES + SEGMENT_BYTES:
                    raise OSError(f"{self._held_bytes} bytes of journal could not be put to {self.folder.url}.")
                self._is_stale = True
                if self._timer is None:
                    self._put_later()
                return
            try:
                self._write()
            except OSError as error:
                if self._held_bytes > HELD_BYTES:
                    raise
                where, count = self.folder.url, len(self._held)
                log.warning("The journal in %s cannot be written (%s); %d lines are held.", where, error, count)

    def flush(self) -> None:
        """Make all that was appended durable. Raises the error of the storage when that cannot be done."""
        if not self.folder.is_local:
            self._put()
            return
        with self._lock:
            self._write()
            if self._file >= 0:
                os.fsync(self._file)

    def close(self) -> None:
        """Write what is held. Raises the error of the storage when that cannot be done."""
        with self._lock:
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        self.flush()
        with self._lock:
            if self._file >= 0:
                self._leave_segment()

    def _write(self) -> None:
        data = b"".join(self._held)
        written = 0
        try:
            while written < len(data):
                if self._file < 0:
                    self._open_segment()
                count = os.write(self._file, data[written:])
                written += count
                self._file_bytes += count
        except OSError as error:
            # what was cut stays behind as the torn last line of its segment; its record goes to the next one
            if written or error.errno not in FULL:  # or else a disk that stays full would get a new one for each try
                self._leave_segment()
            # (written + 1: a record that lacks only its line end is read, so it must not come twice)
            whole = data.rfind(b"\n", 0, written + 1) + 1
            self._hold(data[whole:].splitlines(keepends=True))
            raise
        self._hold([])
        if self._file_bytes >= SEGMENT_BYTES:
            self._leave_segment()

    def _hold(self, lines: list[bytes]) -> None:
        self._held = lines
        self._held_bytes = sum(map(len, lines))

    def _open_segment(self) -> None:
        os.makedirs(self.folder.url, exist_ok=True)
        number = _last_segment(self.folder) + 1
        while True:
            path = os.path.join(self.folder.url, f"journal-{number:05d}.jsonl")
            try:
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                number += 1
            else:
                self._file_bytes = 0
                return

    def _leave_segment(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _put_later(self) -> None:
        self._timer = threading.Timer(PUT_EVERY_S, self._put_held)
        self._timer.daemon = True
        self._timer.start()

    def _put_held(self) -> None:
        try:
            self._put()
        except Exception as error:  # noqa: BLE001 - each fsspec backend has errors of its own; the lines stay held
            log.warning("The journal in %s cannot be written (%s); trying again.", self.folder.url, error)
        with self._lock:
            if self._timer is threading.current_thread():
                self._timer = None
                if self._is_stale:
                    self._put_later()

    def _put(self) -> None:
        with self._put_lock:  # puts must not overtake each other
            with self._lock:
                if not self._is_stale:
                    return
                count, data = len(self._held), b"".join(self._held)
                self._is_stale = False
            try:
                if not self._segment:
                    self._segment = f"journal-{_last_segment(self.folder) + 1:05d}.jsonl"
                self.folder.write(self._segment, data)
            except BaseException:
                with self._lock:
                    self._is_stale = True
                raise
            with self._lock:
                if len(data) >= SEGMENT_BYTES:
                    self._segment = ""
                    self._hold(self._held[count:])


def _segments(folder: Folder) -> list[tuple[int, str]]:
    return sorted((int(match[1]), name) for name in folder.names() if (match := _SEGMENT.fullmatch(name)))


def _last_segment(folder: Folder) -> int:
    return max((number for number, _ in _segments(folder)), default=0)


def read(folder: Folder) -> list[dict[str, object]]:
    """Return the records of all segments in order; none when there is no journal.

    The last line of a segment may be torn by a crash, or be in the middle of being written: it is left out. Any
    other line that is not a record raises LeptonError.
    """
    records: list[dict[str, object]] = []
    for _, name in _segments(folder):
        *lines, last = folder.read(name).split(b"\n")
        for number, line in enumerate(lines, start=1):
            record = _record(line)
            if record is None:
                raise LeptonError(
                    f"{folder.url}/{name}, line {number} is not a journal record: {line[:60]!r}. The file was altered; "
                    "remove that line to read the rest."
                )
            records.append(record)
        record = _record(last)
        if record is not None:
            records.append(record)
    return records


def _record(line: bytes) -> dict[str, object] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "event" in record else None
