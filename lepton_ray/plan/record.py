"""What a run was told and ordered, as records of a journal, and back, to recall it or to replay it.

A journal has one record for each life of the controller, `began`, and one for each event that changed the run or
brought an order, `told`. Each is written before what it orders is done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lepton_ray.plan.adopt import Past, recall
from lepton_ray.plan.events import Command, Event, Form

_KINDS: dict[str, type] = {kind.__name__: kind for kind in (*get_args(Event), *get_args(Command))}
_hints = cache(get_type_hints)


def began(how: str, arguments: Mapping[str, Any], commands: Sequence[Command]) -> dict[str, Any]:
    """Return the record of the beginning of a life. how: "begin" or "adopt", of which these are the arguments."""
    return {"event": "began", "how": how, "arguments": plain(arguments), "commands": plain(commands)}


def told(what: Event, now_s: float, commands: Sequence[Command]) -> dict[str, Any]:
    """Return the record of an event."""
    return {"event": "told", "now_s": now_s, "what": plain(what), "commands": plain(commands)}


def of_generation(form: Form) -> dict[str, Any]:
    """Return the record of a generation, for people and for `verify`."""
    return {
        "event": "generation",
        "generation": form.generation,
        "workers": [*form.members],
        "cause": form.cause,
        "settled": form.settlement.reason if form.settlement is not None else None,
    }


def of_this_life(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return what is on record since the run was started last, with the header if that was then."""
    begun = [at for at, record in enumerate(records) if record["event"] == "began" and record["how"] == "begin"]
    if not begun:
        return []
    return list(records[0 if len(begun) == 1 and records[0]["event"] == "header" else begun[-1] :])


def remembered(records: Iterable[Mapping[str, Any]]) -> Past:
    """Return what a journal knows of a run. Records of other kinds are passed over."""
    past = Past()
    for record in records:
        if record["event"] in ("began", "told"):
            what = record.get("what")
            past = recall(past, what and revived(what), [revived(command) for command in record["commands"]])
    return past


def plain(value: Any) -> Any:
    """Turn events, commands and what they are made of into what JSON knows."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {
            "kind": type(value).__name__,
            **{field.name: plain(getattr(value, field.name)) for field in fields(value)},
        }
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, Collection) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def revived(record: Mapping[str, Any]) -> Any:
    """Make an event or a command of its plain form."""
    return value(_KINDS[record["kind"]], record)


def value(hint: Any, found: Any) -> Any:
    """Make a value of a type of its plain form."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return None if found is None else value(next(part for part in parts if part is not type(None)), found)
    if origin is tuple:
        return tuple(value(parts[0], item) for item in found)
    if origin is frozenset:
        return frozenset(value(parts[0], item) for item in found)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if get_origin(parts[0]) is tuple:  # no key of JSON: not needed to replay
            return {}
        return {value(parts[0], key): value(parts[1], item) for key, item in found.items()}
    if isinstance(origin, type) and issubclass(origin, Collection):
        return [value(parts[0], item) for item in found]
    if isinstance(hint, type) and is_dataclass(hint):
        hints = _hints(hint)
        return hint(**{name: value(hints[name], item) for name, item in found.items() if name != "kind"})
    return hint(found) if isinstance(hint, type) else found
