"""Durable checkpoints: exact, safe to load, and written behind the training's back.

    <run>/checkpoints/step-00000120/state-0.safetensors    all tensors
                                    manifest.json          everything else; sizes and SHA-256; written last

A checkpoint exists when its manifest does. No file is ever unpickled. Training is blocked for one copy into a staging
buffer that is laid out as the data section of the safetensors file, kept from save to save and touched before the first
one, so that neither page faults nor a serializer lie in its way; a background thread hashes and writes the buffer.
There is one buffer, not two: a second one would cost the size of model and optimizer again, to gain something only
where checkpoints follow each other faster than the storage takes them.

The JSON is Python's (NaN and Infinity stand for themselves), so that every float comes back bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import re
import struct
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from io import BufferedIOBase
from typing import Any, Literal

import torch
from torch import Tensor

from lepton_ray.errors import CheckpointError, WaitTimeout
from lepton_ray.storage import Folder

log = logging.getLogger(__name__)

FORMAT = "lepton_ray checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
CHUNK_BYTES = 4 << 20

_STEP = re.compile(r"step-(\d{8,})")
# names of the safetensors format; torch has more types, which a checkpoint refuses by name
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_DICTS: dict[str, type[dict[Any, Any]]] = {"$dict": dict, "$OrderedDict": OrderedDict, "$Counter": Counter}


# --- trees: anything made of dicts, lists, tuples, tensors and JSON scalars, as tensors by name and JSON


# Any here and below: a state_dict is a tree of whatever its owner put in
def flatten(tree: Any, root: str, tensors: dict[str, Tensor]) -> Any:
    """Return JSON for `tree`, exact down to key types and tuples; its tensors are added to `tensors`.

    root: how the names of its tensors, and its errors, begin. Raises CheckpointError that names what cannot be kept.
    """
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if isinstance(tree, Tensor):
        name = root
        while name in tensors:
            name += "'"
        tensors[name] = tree
        return {"$tensor": name}
    if isinstance(tree, float):  # numpy.float64: the same number with the same arithmetic
        return float(tree)
    if type(tree) is list:
        return [flatten(item, f"{root}/{i}", tensors) for i, item in enumerate(tree)]
    if type(tree) is tuple:
        return {"$tuple": [flatten(item, f"{root}/{i}", tensors) for i, item in enumerate(tree)]}
    if type(tree) is dict and all(type(key) is str and not key.startswith("$") for key in tree):
        return {key: flatten(item, f"{root}/{key}", tensors) for key, item in tree.items()}
    for mark, kind in _DICTS.items():
        if type(tree) is kind:
            return {
                mark: [
                    [flatten(key, f"{root} (a key)", tensors), flatten(item, f"{root}/{key}", tensors)]
                    for key, item in tree.items()
                ]
            }
    raise CheckpointError(
        f"{root} is a {type(tree).__module__}.{type(tree).__qualname__}, which a checkpoint cannot hold. "
        "It holds tensors, dicts, lists, tuples, str, int, float, bool and None: convert it to one of these."
    )


def unflatten(tree: Any, tensor: Callable[[str], Any]) -> Any:
    """Rebuild what `flatten` took apart. tensor: gives the tensor of a name."""
    if isinstance(tree, list):
        return [unflatten(item, tensor) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        (mark, value), *_ = tree.items()
        if mark == "$tensor":
            return tensor(value)
        if mark == "$tuple":
            return tuple(unflatten(item, tensor) for item in value)
        if mark in _DICTS:
            return _DICTS[mark]({unflatten(key, tensor): unflatten(item, tensor) for key, item in value})
    return {key: unflatten(item, tensor) for key, item in tree.items()}


def flatten_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Take the state_dict of any torch optimizer apart: tensors by name, and JSON for the rest.

    Raises CheckpointError that names the key of a value that cannot be kept.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, flatten(dict(state_dict), "optimizer", tensors)


def unflatten_optimizer(tensors: Mapping[str, Tensor], json_state: Any) -> dict[str, Any]:
    """Undo `flatten_optimizer`. tensors: may hold others too."""
    state: dict[str, Any] = unflatten(json_state, tensors.__getitem__)
    return state


# --- the safetensors file


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Where a tensor lies in the data section."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The layout of a safetensors file."""

    head: bytes
    """Length of the header, and the header."""
    spans: tuple[_Span, ...]
    size_bytes: int
    """Of the data section."""


def _plan(tensors: Mapping[str, Tensor]) -> _Plan:
    """Lay tensors out without gaps, wide types first so that each is aligned; the header keeps their order."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPE_NAMES or tensor.is_meta:
            raise CheckpointError(
                f"A checkpoint cannot hold tensor {name!r} ({tensor.dtype}, {tensor.layout}, on {tensor.device}). "
                f"Use a dense tensor of one of the types {', '.join(sorted(_DTYPE_NAMES.values()))}."
            )
    header: dict[str, dict[str, object]] = dict.fromkeys(tensors, {})
    spans = []
    start = 0
    for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):
        tensor = tensors[name]
        stop = start + tensor.numel() * tensor.itemsize
        shape = tuple(tensor.shape)
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, stop]}
        spans.append(_Span(name=name, dtype=tensor.dtype, shape=shape, start=start, stop=stop))
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _Plan(head=struct.pack("<Q", len(text)) + text, spans=tuple(spans), size_bytes=start)


def _view(data: Tensor, span: _Span) -> Tensor:
    return data[span.start : span.stop].view(span.dtype).view(span.shape)


def _chunks(data: Tensor) -> Iterator[memoryview]:
    view = memoryview(data.numpy())
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


def _parse(data: Tensor) -> dict[str, Tensor]:
    """View the tensors of a whole safetensors file. Raises ValueError, KeyError or TypeError when it is not one."""
    length = struct.unpack("<Q", data[:8].numpy().tobytes())[0] if len(data) >= 8 else len(data)
    if 8 + length > len(data):
        raise ValueError("the header is cut")
    header = json.loads(data[8 : 8 + length].numpy().tobytes())
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    body = data[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if not 0 <= start <= stop <= len(body):
            raise ValueError(f"tensor {name!r} lies outside of the file")
        tensors[name] = _view(body, _Span(name=name, dtype=dtype, shape=tuple(shape), start=start, stop=stop))
    return tensors


# --- the manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """What a manifest promises about a file."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    generation: int
    saved_at_s: float
    """Seconds since 1970."""
    state: Any
    """The state that was staged, in the JSON of `flatten`."""
    files: tuple[File, ...]

    def describe(self) -> Any:
        """Return the state without reading tensors; where it holds a tensor, the tensor's name stands."""
        return unflatten(self.state, lambda name: name)


class _Foreign(CheckpointError):
    """A manifest that another program or version wrote."""


def step_folder(folder: Folder, step: int) -> Folder:
    """Name the folder of a step's checkpoint."""
    return folder.sub(f"step-{step:08d}")


def _steps(folder: Folder) -> list[int]:
    return sorted(int(match[1]) for name in folder.names() if (match := _STEP.fullmatch(name)))


def read_manifest(folder: Folder, step: int) -> Manifest:
    """Read the manifest of a step. Raises FileNotFoundError when there is none, CheckpointError when it is damaged."""
    at = step_folder(folder, step)
    path = f"{at.url}/{MANIFEST}"
    content = at.read(MANIFEST)
    try:
        fields = json.loads(content)
        if not isinstance(fields, dict):
            raise ValueError(f"it holds a {type(fields).__name__}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} ({len(content)} bytes) is damaged: not a JSON object ({error}).") from error
    if fields.get("format") != FORMAT or fields.get("version") != VERSION:
        raise _Foreign(
            f"{path} was written as {fields.get('format')!r} version {fields.get('version')!r}; "
            f"this release reads {FORMAT!r} version {VERSION}."
        )
    try:
        files = tuple(
            File(name=str(file["name"]), size_bytes=int(file["size_bytes"]), sha256=str(file["sha256"]))
            for file in fields["files"]
        )
        manifest = Manifest(
            step=int(fields["step"]),
            generation=int(fields["generation"]),
            saved_at_s=float(fields["saved_at_s"]),
            state=fields["state"],
            files=files,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}.") from error
    if fields.get("sha256") != _digest(manifest):
        raise CheckpointError(f"{path} is damaged: its content does not have the SHA-256 that it states.")
    if manifest.step != step:
        raise CheckpointError(f"{path} is of step {manifest.step}, but lies in the folder of step {step}.")
    return manifest


def _fields(manifest: Manifest) -> dict[str, Any]:
    return {
        "step": manifest.step,
        "generation": manifest.generation,
        "saved_at_s": manifest.saved_at_s,
        "state": manifest.state,
        "files": [asdict(file) for file in manifest.files],
    }


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(_fields(manifest)).encode()).hexdigest()


def _manifest_bytes(manifest: Manifest) -> bytes:
    head = {"format": FORMAT, "version": VERSION, "sha256": _digest(manifest)}
    return json.dumps({**head, **_fields(manifest)}).encode()


def _check_file(at: Folder, promised: File, into: Tensor | None) -> None:
    """Compare a file with its manifest; keep its bytes in `into`. Raises CheckpointError."""
    path = f"{at.url}/{promised.name}"
    try:
        found = at.size(promised.name)
        if found != promised.size_bytes:
            raise CheckpointError(f"{path} has {found} bytes; its manifest says {promised.size_bytes}.")
        digest = hashlib.sha256()
        with at.open(promised.name, "rb") as file:
            target = torch.empty(min(found, CHUNK_BYTES), dtype=torch.uint8) if into is None else into
            done = 0
            while done < found:
                chunk = memoryview(target.numpy())
                chunk = chunk[: found - done] if into is None else chunk[done : done + CHUNK_BYTES]
                _read_exactly(file, chunk)
                digest.update(chunk)
                done += len(chunk)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; its manifest names it.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    if digest.hexdigest() != promised.sha256:
        raise CheckpointError(f"{path} was altered: its SHA-256 is not the one in its manifest.")


def _read_exactly(file: BufferedIOBase, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise OSError(f"it ended {len(target) - done} bytes early")
        done += count


def newest(folder: Folder) -> tuple[Manifest | None, list[str]]:
    """Return the newest checkpoint whose files are all as promised, and what was wrong with newer ones.

    A folder without a manifest is a save that did not finish, and not worth a sentence. Every byte is read.
    """
    complaints: list[str] = []
    for step in reversed(_steps(folder)):
        found = _verify(folder, step)
        if isinstance(found, Manifest):
            return found, complaints
        complaints += found
    return None, complaints


def _verify(folder: Folder, step: int) -> Manifest | list[str]:
    try:
        manifest = read_manifest(folder, step)
        for file in manifest.files:
            _check_file(step_folder(folder, step), file, None)
    except FileNotFoundError:
        return []
    except (CheckpointError, OSError) as error:
        return [str(error)]
    return manifest


def load(folder: Folder, step: int) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors (on the CPU) and the state of a step's checkpoint, exactly as they were staged.

    What is checked is what is returned: each file is read once, into memory that its tensors then share.
    Raises CheckpointError that names the file which is missing or altered.
    """
    at = step_folder(folder, step)
    try:
        manifest = read_manifest(folder, step)
    except FileNotFoundError as error:
        raise CheckpointError(f"{at.url}/{MANIFEST} is missing: step {step} has no finished checkpoint.") from error
    tensors: dict[str, Tensor] = {}
    for file in manifest.files:
        data = torch.empty(file.size_bytes, dtype=torch.uint8)
        _check_file(at, file, data)
        try:
            tensors.update(_parse(data))
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{at.url}/{file.name} is not a safetensors file ({error}).") from error
    in_state: set[str] = set()

    def take(name: str) -> Tensor:
        in_state.add(name)
        return tensors[name]

    try:
        state = unflatten(manifest.state, take)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{at.url}/{MANIFEST} names a tensor that its files do not hold ({error}).") from error
    return {name: tensor for name, tensor in tensors.items() if name not in in_state}, state


# --- writing


@dataclass(slots=True, kw_only=True)
class _Staged:
    """A checkpoint between stage and commit."""

    step: int
    generation: int
    state: Any
    head: bytes
    size_bytes: int
    began_s: float
    blocked_s: float = 0.0
    waited_s: float = 0.0
    manifest: Manifest | None = None
    """None until the tensors are written, by the background thread."""


class Checkpointer:
    """Write the checkpoints of one run. One caller; one background thread that does everything but the copy.

    folder: that of the checkpoints. keep: newest checkpoints that stay. best: name in state["metrics"] whose best
    checkpoint stays too; best_mode: which values are better.
    on_event: told "checkpoint_saved" (step, generation, path, size_bytes, duration_s from stage to manifest,
    blocked_s of the training, waited_s of it for an earlier write) and "checkpoint_failed" (step, error) in the
    background thread. A failed save raises nothing: training goes on, older checkpoints stay.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        keep: int,
        best: str | None = None,
        best_mode: Literal["auto", "min", "max"] = "auto",
        on_event: Callable[..., object] | None = None,
        write_timeout_s: float = 600,
    ) -> None:
        self.folder = folder
        self.keep, self.best = keep, best
        self.is_max_best = best_mode == "max" or (best_mode == "auto" and best is not None and _grows(best))
        self.write_timeout_s = write_timeout_s
        self._on_event = on_event
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._buffer_user: Future[None] | None = None  # the last job that reads or fills the buffer
        self._last: Future[None] | None = None
        self._staged: dict[int, _Staged] = {}
        self._saved: dict[int, Manifest] = {}  # manifests need not be read again to choose what to keep
        self._jobs: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = queue.SimpleQueue()
        # a daemon, so that a storage that hangs cannot keep the process alive
        self._thread = threading.Thread(target=self._serve, name="checkpointer", daemon=True)
        self._thread.start()

    def prepare(self, tensors: Mapping[str, Tensor], state: Any = None) -> None:
        """Allocate and touch the staging buffer in the background, for tensors and state of these sizes."""
        tensors, _ = _together(tensors, state)
        size_bytes, is_pinned = _plan(tensors).size_bytes, _is_cuda(tensors)
        self._buffer_user = self._submit(lambda: self._allocate(size_bytes, is_pinned))

    def stage(self, step: int, tensors: Mapping[str, Tensor], state: Any, *, generation: int = 0) -> float:
        """Copy what makes a checkpoint; return the seconds that this took. The tensors may change afterwards.

        state: a tree of dicts, lists, tuples, scalars and tensors. Waits for an earlier write that still needs the
        buffer, at most write_timeout_s; after that this checkpoint fails. Nothing can be loaded before `commit(step)`.
        Raises CheckpointError for a tensor or a value that a checkpoint cannot hold.
        """
        began_s = time.perf_counter()
        all_tensors, json_state = _together(tensors, state)
        plan = _plan(all_tensors)
        if self._buffer_user is not None:
            _, unfinished = wait([self._buffer_user], self.write_timeout_s)
            if unfinished:
                error = f"the write of an earlier checkpoint did not end within {self.write_timeout_s:g} s"
                self._submit(lambda: self._report_failure(step, error))
                return time.perf_counter() - began_s
        waited_s = time.perf_counter() - began_s
        try:
            self._allocate(plan.size_bytes, _is_cuda(all_tensors))
        except (RuntimeError, MemoryError) as failure:
            error = f"no memory for a staging buffer of {plan.size_bytes} bytes ({failure})"
            self._submit(lambda: self._report_failure(step, error))
            return time.perf_counter() - began_s
        copied = _copy(all_tensors, plan, self._buffer)
        staged = _Staged(
            step=step,
            generation=generation,
            state=json_state,
            head=plan.head,
            size_bytes=plan.size_bytes,
            began_s=began_s,
            waited_s=waited_s,
        )
        staged.blocked_s = time.perf_counter() - began_s
        self._buffer_user = self._submit(lambda: self._write(staged, copied))
        return staged.blocked_s

    def commit(self, step: int) -> None:
        """Say that the staged step is stable: its manifest may be published. A step that failed is no error."""
        self._submit(lambda: self._publish(step))

    def discard(self, step: int) -> None:
        """Say that the staged step never happened."""
        self._submit(lambda: self._drop(step))

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when all that was asked for is done. Raises WaitTimeout after timeout_s (default write_timeout_s)."""
        limit_s = self.write_timeout_s if timeout_s is None else timeout_s
        if self._last is not None and wait([self._last], limit_s).not_done:
            raise WaitTimeout(f"Waited {limit_s:g} s for checkpoints to be written to {self.folder.url}.")

    def close(self, timeout_s: float | None = None) -> None:
        """Wait, then end the thread and free the buffer. Raises WaitTimeout; the thread then ends by itself."""
        self._jobs.put(None)
        self.wait(timeout_s)
        self._buffer = torch.empty(0, dtype=torch.uint8)

    # --- the background thread

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        self._last = Future()
        self._jobs.put((self._last, work))
        return self._last

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work = job
            try:
                work()
            except Exception:  # of the caller's on_event, or no memory; the next checkpoint must still be possible
                log.exception("Background work on the checkpoints in %s failed.", self.folder.url)
            future.set_result(None)

    def _allocate(self, size_bytes: int, is_pinned: bool) -> None:
        if self._buffer.numel() >= size_bytes and (self._buffer.is_pinned() or not is_pinned):
            return
        self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes first: both might not fit
        buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        for start in range(0, size_bytes, CHUNK_BYTES):  # in pieces that torch does not spread over threads
            buffer[start : start + CHUNK_BYTES].zero_()
        self._buffer = buffer

    def _write(self, staged: _Staged, copied: torch.Event | None) -> None:
        at = step_folder(self.folder, staged.step)
        try:
            if copied is not None:
                copied.synchronize()
            taken = at.names()
            number = 0
            while f"state-{number}.safetensors" in taken:  # never over a file that a manifest may name
                number += 1
            name = f"state-{number}.safetensors"
            digest = hashlib.sha256(staged.head)
            with at.open(name, "wb") as file:
                file.write(staged.head)
                for chunk in _chunks(self._buffer[: staged.size_bytes]):
                    digest.update(chunk)
                    file.write(chunk)
        except Exception as error:  # noqa: BLE001 - each storage has errors of its own
            self._fail(staged.step, error)
            return
        size_bytes = len(staged.head) + staged.size_bytes
        staged.manifest = Manifest(
            step=staged.step,
            generation=staged.generation,
            saved_at_s=time.time(),
            state=staged.state,
            files=(File(name=name, size_bytes=size_bytes, sha256=digest.hexdigest()),),
        )
        self._staged[staged.step] = staged

    def _publish(self, step: int) -> None:
        staged = self._staged.pop(step, None)
        if staged is None or staged.manifest is None:
            return
        at = step_folder(self.folder, step)
        try:
            at.write(MANIFEST, _manifest_bytes(staged.manifest))
        except Exception as error:  # noqa: BLE001 - each storage has errors of its own
            self._fail(step, error)
            return
        self._saved[step] = staged.manifest
        self._tell(
            "checkpoint_saved",
            step=step,
            generation=staged.generation,
            path=at.url,
            size_bytes=staged.manifest.files[0].size_bytes,
            duration_s=time.perf_counter() - staged.began_s,
            blocked_s=staged.blocked_s,
            waited_s=staged.waited_s,
        )
        try:
            self._retain(step)
        except Exception as error:  # noqa: BLE001 - each storage has errors of its own; what was not deleted is tried again next time
            log.warning("Old checkpoints in %s cannot be deleted (%s).", self.folder.url, error)

    def _drop(self, step: int) -> None:
        self._staged.pop(step, None)
        try:
            self._tidy(step)
        except Exception as error:  # noqa: BLE001 - as in _publish
            log.warning("What is left of step %s in %s cannot be deleted (%s).", step, self.folder.url, error)

    def _fail(self, step: int, error: Exception) -> None:
        self._drop(step)
        self._report_failure(step, f"{type(error).__name__}: {error}")

    def _report_failure(self, step: int, error: str) -> None:
        log.warning("The checkpoint of step %s in %s failed (%s); older ones are kept.", step, self.folder.url, error)
        self._tell("checkpoint_failed", step=step, path=step_folder(self.folder, step).url, error=error)

    def _tell(self, kind: str, **fields: object) -> None:
        if self._on_event is not None:
            self._on_event(kind, **fields)

    def _retain(self, published: int) -> None:
        """Delete what is neither among the newest nor the best, and what dead writers left.

        Steps after the one published now belong to a life of the run that this one did not continue.
        """
        whole: list[int] = []
        for step in _steps(self.folder):
            if step in self._staged:
                continue
            try:
                if step not in self._saved:
                    self._saved[step] = read_manifest(self.folder, step)
            except _Foreign:
                continue
            except (FileNotFoundError, CheckpointError):
                self._delete(step)
                continue
            if step > published:
                self._delete(step)
            else:
                whole.append(step)
        stay = set(whole[-self.keep :])
        scores = {step: score for step in whole if (score := self._score(self._saved[step])) is not None}
        if scores:
            stay.add(max(scores, key=lambda step: (scores[step], -step)))
        for step in whole:
            if step not in stay:
                self._delete(step)
        self._tidy(published)

    def _score(self, manifest: Manifest) -> float | None:
        if self.best is None:
            return None
        try:
            value = float(manifest.state["metrics"][self.best])
        except (KeyError, TypeError, ValueError):
            return None
        if value != value:
            return None
        return value if self.is_max_best else -value

    def _delete(self, step: int) -> None:
        at = step_folder(self.folder, step)
        at.delete(MANIFEST)  # first, so that no moment shows a manifest without its files
        at.delete_all()
        self._saved.pop(step, None)

    def _tidy(self, step: int) -> None:
        """Delete from a step's folder what its manifest does not name; without a manifest, all of it."""
        at = step_folder(self.folder, step)
        try:
            manifest = read_manifest(self.folder, step)
        except FileNotFoundError:
            at.delete_all()
            return
        except CheckpointError:
            return
        for name in set(at.names()) - {MANIFEST, *(file.name for file in manifest.files)}:
            at.delete(name)


def _together(tensors: Mapping[str, Tensor], state: Any) -> tuple[dict[str, Tensor], Any]:
    both = dict(tensors)
    return both, flatten(state, "state", both)


def _copy(tensors: Mapping[str, Tensor], plan: _Plan, buffer: Tensor) -> torch.Event | None:
    """Copy tensors into the buffer. Copies from a device run behind its queue; the event says when they are done."""
    device = None
    with torch.no_grad():
        for span in plan.spans:
            source = tensors[span.name]
            if span.stop > span.start:
                _view(buffer, span).copy_(source, non_blocking=True)
            if source.device.type != "cpu":
                device = source.device
    if device is None:
        return None
    event = torch.Event(device)
    event.record()
    return event


def _is_cuda(tensors: Mapping[str, Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors.values())


def _grows(metric: str) -> bool:
    """Tell whether larger is better, from a metric's name."""
    return any(word in metric.lower() for word in ("accuracy", "auc", "f1", "top"))
