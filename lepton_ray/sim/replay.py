"""Replay a run from its journal: tell the planner what it was told, and compare what it orders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_type_hints

from lepton_ray.plan.adopt import adopt
from lepton_ray.plan.events import Run, Step
from lepton_ray.plan.membership import advance, begin
from lepton_ray.plan.record import plain, revived, value

_HOW: dict[str, Callable[..., Step]] = {"begin": begin, "adopt": adopt}


def replay(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return where today's planner orders something else than the recorded one did, one line for each event.

    Raises ValueError when the journal holds nothing to replay.
    """
    run: Run | None = None
    differences = []
    for number, record in enumerate(records):
        if record["event"] == "began":
            call = _HOW[record["how"]]
            hints = get_type_hints(call)
            run, commands = call(**{name: value(hints[name], found) for name, found in record["arguments"].items()})
            what = record["how"]
        elif record["event"] == "told" and run is not None:
            run, commands = advance(run, revived(record["what"]), record["now_s"])
            what = record["what"]["kind"]
        else:
            continue
        if plain(commands) != record["commands"]:
            differences.append(f"record {number}, {what}: ordered {plain(commands)}, and then {record['commands']}")
    if run is None:
        raise ValueError("This journal has no record of what its controller was told: nothing can be replayed.")
    return differences
