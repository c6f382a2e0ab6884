"""Where the output of workers goes, and what of a traceback a user needs to see."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lepton_ray.storage import Folder


@contextmanager
def written_to(folder: Folder, name: str) -> Iterator[None]:
    """Let what this process prints go to the file `name`.log of a folder, after what it wrote there before."""
    if folder.is_local:
        path = os.path.join(folder.url, f"{name}.log")
        os.makedirs(folder.url, exist_ok=True)
    else:  # written anew at the end of each part, by each process under a name of its own
        name = f"{name}.{os.getpid()}"
        path = os.path.join(tempfile.gettempdir(), f"lepton_ray-{folder.url.replace('/', '_')}-{name}.log")
    _flush()
    kept = os.dup(1), os.dup(2)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(target, 1), os.dup2(target, 2)
        yield
    finally:
        _flush()
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        for descriptor in (*kept, target):
            os.close(descriptor)
        if not folder.is_local:
            with open(path, "rb") as file:
                folder.write(f"{name}.log", file.read())


def _flush() -> None:
    """Write out what was printed. What a full disk does not take is written with what is printed next."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


def user_traceback(error: BaseException) -> str:
    """Format a traceback from the first frame of the user's code on (all of it when there is none)."""
    frames = traceback.extract_tb(error.__traceback__)
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    first = next((i for i, frame in enumerate(frames) if not frame.filename.startswith(own)), 0)
    lines = ["Traceback (most recent call last, in the worker):\n", *traceback.format_list(frames[first:])]
    return "".join(lines + traceback.format_exception_only(error)).rstrip()
