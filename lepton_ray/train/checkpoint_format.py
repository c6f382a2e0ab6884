"""What a checkpoint is on storage, and how it is read: exact, safe to load, checked to the last byte.

    <run>/checkpoints/step-00000120/state-0.safetensors     all tensors
                                    worker-1-0.safetensors  after local steps: what only the worker of rank 1 holds
                                    manifest.json           everything else; sizes and SHA-256; written last

A checkpoint exists when its manifest does. No file is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from io import BufferedIOBase
from typing import Any

import torch
from torch import Tensor

from lepton_ray.errors import CheckpointError
from lepton_ray.storage import Folder
from lepton_ray.train.tree import flatten, unflatten

FORMAT = "lepton_ray checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
CHUNK_BYTES = 4 << 20

_STEP = re.compile(r"step-(\d{8,})")
_WORKER = re.compile(r"worker-(\d+)-\d+\.safetensors")
_STATE = "$state"
"""Holds, in the file of a worker, what is not a tensor."""
# names of the safetensors format; torch has more types, which are refused by name
DTYPES: dict[str, torch.dtype] = {
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
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# --- the safetensors file


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Where a tensor lies in the data section."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def view(self, data: Tensor) -> Tensor:
        """View the tensor in the bytes of a data section."""
        return data[self.start : self.stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """The layout of a safetensors file."""

    head: bytes
    """Length of the header, and the header."""
    spans: tuple[Span, ...]
    size_bytes: int
    """Of the data section."""


def plan_file(tensors: Mapping[str, Tensor]) -> FilePlan:
    """Lay tensors out without gaps, wide types first so that each is aligned; the header keeps their order."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPE_NAMES or tensor.is_meta:
            raise CheckpointError(
                f"A safetensors file cannot hold {name!r} ({tensor.dtype}, {tensor.layout}, on {tensor.device}). "
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
        spans.append(Span(name=name, dtype=tensor.dtype, shape=shape, start=start, stop=stop))
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return FilePlan(head=struct.pack("<Q", len(text)) + text, spans=tuple(spans), size_bytes=start)


def file_pieces(head: bytes, data: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file piece by piece, so that nobody needs a copy of it in memory.

    head: the plan's. data: the tensors in the order of the plan's spans, or the whole data section as one tensor.
    """
    yield head
    for tensor in data:
        whole = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        for start in range(0, len(whole), CHUNK_BYTES):
            yield whole[start : start + CHUNK_BYTES]


def write_file(at: Folder, stem: str, head: bytes, data: Iterable[Tensor]) -> File:
    """Write a safetensors file under the first free name `<stem>-<number>`: never over one that a manifest may name.

    head, data: as `file_pieces`.
    """
    taken = at.names()
    number = 0
    while f"{stem}-{number}.safetensors" in taken:
        number += 1
    name = f"{stem}-{number}.safetensors"
    digest, size_bytes = hashlib.sha256(), 0
    with at.open(name, "wb") as file:
        for piece in file_pieces(head, data):
            digest.update(piece)
            file.write(piece)
            size_bytes += len(piece)
    return File(name=name, size_bytes=size_bytes, sha256=digest.hexdigest())


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
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if not 0 <= start <= stop <= len(body):
            raise ValueError(f"tensor {name!r} lies outside of the file")
        tensors[name] = Span(name=name, dtype=dtype, shape=tuple(shape), start=start, stop=stop).view(body)
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
    """The state that was saved, in the JSON of `flatten`."""
    files: tuple[File, ...]


def write_own(folder: Folder, step: int, rank: int, state: Any) -> File:
    """Write what only one worker holds, for the manifest of rank 0 to name. state: as that of a checkpoint."""
    tensors = together({}, state)
    plan = plan_file(tensors)
    return write_file(step_folder(folder, step), f"worker-{rank}", plan.head, [tensors[s.name] for s in plan.spans])


def together(tensors: Mapping[str, Tensor], state: Any) -> dict[str, Tensor]:
    """Return the tensors of a file that holds a state as well."""
    both = dict(tensors)
    text = json.dumps(flatten(state, "state", both)).encode()
    return {**both, _STATE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def apart(tensors: dict[str, Tensor], path: str) -> tuple[dict[str, Tensor], Any]:
    """Return what `together` was given. Raises CheckpointError."""
    try:
        state = json.loads(tensors.pop(_STATE).numpy().tobytes())
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} holds no state of a worker ({error}).") from error
    return _rebuild(state, tensors, path)


class ForeignManifest(CheckpointError):
    """A manifest that another program or version wrote."""


def step_folder(folder: Folder, step: int) -> Folder:
    """Name the folder of a step's checkpoint."""
    return folder.sub(f"step-{step:08d}")


def steps_in(folder: Folder) -> list[int]:
    """List the steps that have a folder, finished or not, in order."""
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
        raise ForeignManifest(
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


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return what `read_manifest` reads."""
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


def newest(folder: Folder, limit: float = math.inf) -> tuple[Manifest | None, list[str]]:
    """Return the newest checkpoint whose files are all as promised, and what was wrong with newer ones.

    limit: the last step that may be.
    A folder without a manifest is a save that did not finish, and not worth a sentence. Every byte is read.
    """
    complaints: list[str] = []
    for step in reversed([step for step in steps_in(folder) if step <= limit]):
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
    at, manifest = step_folder(folder, step), _manifest_of(folder, step)
    tensors: dict[str, Tensor] = {}
    for file in manifest.files:
        if not _WORKER.fullmatch(file.name):
            tensors.update(_read_tensors(at, file))
    return _rebuild(manifest.state, tensors, f"{at.url}/{MANIFEST}")


def load_own(folder: Folder, step: int, rank: int) -> Any:
    """Return the state that a worker wrote with `write_own`. Raises CheckpointError, also when there is none."""
    at, manifest = step_folder(folder, step), _manifest_of(folder, step)
    for file in manifest.files:
        found = _WORKER.fullmatch(file.name)
        if found and int(found[1]) == rank:
            return apart(_read_tensors(at, file), f"{at.url}/{file.name}")[1]
    raise CheckpointError(f"{at.url}/{MANIFEST} names no file of worker {rank}.")


def _manifest_of(folder: Folder, step: int) -> Manifest:
    try:
        return read_manifest(folder, step)
    except FileNotFoundError as error:
        path = f"{step_folder(folder, step).url}/{MANIFEST}"
        raise CheckpointError(f"{path} is missing: step {step} has no finished checkpoint.") from error


def _read_tensors(at: Folder, file: File) -> dict[str, Tensor]:
    data = torch.empty(file.size_bytes, dtype=torch.uint8)
    _check_file(at, file, data)
    return parse(data, f"{at.url}/{file.name}")


def parse(data: Tensor, path: str) -> dict[str, Tensor]:
    """View the tensors of a whole safetensors file. Raises CheckpointError."""
    try:
        return _parse(data)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}).") from error


def _rebuild(state: Any, tensors: Mapping[str, Tensor], path: str) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors that are not a part of the state, and the state."""
    in_state: set[str] = set()

    def take(name: str) -> Tensor:
        in_state.add(name)
        return tensors[name]

    try:
        rebuilt = unflatten(state, take)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} names a tensor that its files do not hold ({error}).") from error
    return {name: tensor for name, tensor in tensors.items() if name not in in_state}, rebuilt
