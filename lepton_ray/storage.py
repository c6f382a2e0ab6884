"""A folder on a disk or in an object store, with the few operations that durable things need.

The contract is that of an object store: a name appears whole or not at all, nothing is appended to, nothing is renamed
by the caller. On a disk that is a temporary file, fsync and rename; behind a URL it is one put. fsspec, which
comes with ray[train], is imported only for URLs.
"""

from __future__ import annotations

import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any, Literal

from lepton_ray.errors import ConfigError

_LOCAL_SCHEMES = ("file://", "local://")
_UNFINISHED = ".tmp"  # the end of the names of local files that are being written, or whose writer was killed


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder at an absolute local path or at an fsspec URL. It need not exist; writing creates it.

    url: as given, but for a `file://` in front, which is dropped. Raises ConfigError for a relative path.
    """

    url: str

    def __post_init__(self) -> None:
        url = os.fspath(self.url)
        for scheme in _LOCAL_SCHEMES:
            url = url.removeprefix(scheme)
        if "://" in url:
            url = url.rstrip("/") if not url.endswith("://") else url
        elif os.path.isabs(url):
            url = os.path.normpath(url)
        else:
            found = os.path.abspath(os.path.expanduser(url)) if url else os.path.expanduser("~/lepton_ray")
            raise ConfigError(
                f"storage={url!r} is not an absolute path, so it would be another folder in each process. "
                f"Use {found!r}, or a URL such as 's3://bucket/folder'."
            )
        object.__setattr__(self, "url", url)

    @property
    def is_local(self) -> bool:
        """Tell a path of this machine's file system from a URL."""
        return "://" not in self.url

    def sub(self, *names: str) -> Folder:
        """Name a folder inside this one."""
        return Folder(self._at(*names))

    def names(self) -> list[str]:
        """List files and folders directly inside, sorted; none when the folder does not exist.

        Names that end in `.tmp` are files that are being written, or were when their writer was killed.
        """
        if self.is_local:
            try:
                return sorted(os.listdir(self.url))
            except FileNotFoundError:
                return []
        fs, path = self._remote(self.url)
        try:
            found = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        names = {entry.rstrip("/").rpartition("/")[2] for entry in found if entry.rstrip("/") != path.rstrip("/")}
        return sorted(names - {""})

    def exists(self, name: str) -> bool:
        """Tell whether a file or folder of this name is there."""
        if self.is_local:
            return os.path.exists(self._at(name))
        fs, path = self._remote(self._at(name))
        return bool(fs.exists(path))

    def size(self, name: str) -> int:
        """Return the bytes of a file. Raises FileNotFoundError."""
        if self.is_local:
            return os.path.getsize(self._at(name))
        fs, path = self._remote(self._at(name))
        return int(fs.size(path))

    def read(self, name: str) -> bytes:
        """Return the content of a file. Raises FileNotFoundError."""
        with self.open(name, "rb") as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        """Write a file, durably. Whatever happens meanwhile, it has the old or the new content, whole."""
        if self.is_local:
            with self.open(name, "wb") as file:
                file.write(data)
            return
        fs, path = self._remote(self._at(name))
        try:
            fs.pipe_file(path, data)
        except FileNotFoundError:  # not an object store: folders have to be made
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            fs.pipe_file(path, data)

    @contextmanager
    def open(self, name: str, mode: Literal["rb", "wb"]) -> Iterator[BufferedIOBase]:
        """Open a file for streaming. One that is written appears, durable, when the block ends without an error."""
        if not self.is_local:
            with self._open_remote(name, mode) as remote:
                yield remote
            return
        path = self._at(name)
        if mode == "rb":
            with open(path, "rb") as file:
                yield file
            return
        os.makedirs(self.url, exist_ok=True)
        unfinished = f"{path}.{uuid.uuid4().hex[:8]}{_UNFINISHED}"
        try:
            with open(unfinished, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):
                os.remove(unfinished)
            raise
        self._sync_entries()

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""
        if self.is_local:
            with suppress(FileNotFoundError):
                os.remove(self._at(name))
            return
        fs, path = self._remote(self._at(name))
        with suppress(FileNotFoundError):
            fs.rm_file(path)

    def delete_all(self) -> None:
        """Delete this folder with all that is in it; one that is not there is no error."""
        if self.is_local:
            with suppress(FileNotFoundError):
                shutil.rmtree(self.url)
            return
        fs, path = self._remote(self.url)
        with suppress(FileNotFoundError):
            fs.rm(path, recursive=True)

    def local_path(self, name: str, *, download_to: str) -> str:
        """Return a path at which a file can be opened by readers that know paths only.

        download_to: an existing local folder that gets a copy when this folder is not local.
        """
        if self.is_local:
            return self._at(name)
        target = os.path.join(download_to, name)
        with self.open(name, "rb") as source, open(target, "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        return target

    def probe(self) -> None:
        """Write, read back and delete a small file. Raises ConfigError that says what this machine cannot do here."""
        name = f"probe-{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        content = name.encode()
        doing = "write"
        try:
            self.write(name, content)
            doing = "read back"
            found = self.read(name)
            if found != content:
                raise OSError(f"{len(content)} bytes were written, {len(found)} other bytes came back")
            doing = "delete"
            self.delete(name)
        except ConfigError:
            raise
        except Exception as error:  # each fsspec backend has errors of its own
            raise ConfigError(
                f"storage={self.url!r}: node {platform.node()} cannot {doing} a file there "
                f"({type(error).__name__}: {error}). Free or mount it, correct its rights or credentials on that node, "
                "or give a `storage` that every node can write."
            ) from error

    def _at(self, *names: str) -> str:
        for name in names:
            if name in ("", ".", "..") or "/" in name or "\0" in name:
                raise ConfigError(f"{name!r} cannot name a file or folder in {self.url!r}. Use a name without '/'.")
        return "/".join([self.url.rstrip("/") if self.is_local else self.url, *names])

    # Any: fsspec has no type hints, and must not be imported for local folders
    def _remote(self, url: str) -> tuple[Any, str]:
        scheme = url.partition("://")[0]
        try:
            from fsspec.core import url_to_fs

            fs, path = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"storage={self.url!r}: no file system for {scheme!r} URLs on node {platform.node()} ({error}). "
                "Install the fsspec package for it on every node, or give an absolute path."
            ) from error
        # some backends remember listings; another process may have written since
        fs.invalidate_cache()
        return fs, path

    @contextmanager
    def _open_remote(self, name: str, mode: Literal["rb", "wb"]) -> Iterator[BufferedIOBase]:
        fs, path = self._remote(self._at(name))
        try:
            file = fs.open(path, mode)
        except FileNotFoundError:
            if mode == "rb":
                raise
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            file = fs.open(path, mode)
        try:
            yield file
        except BaseException:
            if mode == "wb":  # closing puts what was written so far: take it away again
                with suppress(Exception):
                    file.close()
                with suppress(Exception):
                    fs.rm_file(path)
            raise
        finally:
            if not file.closed:
                file.close()

    def _sync_entries(self) -> None:
        """Make a rename survive a power cut."""
        entry = os.open(self.url, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)
