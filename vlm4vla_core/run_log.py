"""The log of a run: RUN/log.jsonl, one line of JSON per event, and accelerate's trackers by name.

Trap: the log is cut to the step of the checkpoint that a run goes on from, trackers are not: after a kill they show
some steps twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm4vla_core.errors import InputError, nearest


class RunLog:
    """Appends lines to a run's log and passes their numbers on to trackers; silent where `first` is False."""

    def __init__(self, out: Path, trackers: Sequence[str], *, first: bool) -> None:
        self.path, self.first = out / "log.jsonl", first
        self.trackers = open_trackers(trackers, out) if first else []

    def line(self, step: int, **values: Any) -> None:
        """Append {"step": step, **values}."""
        if not self.first:
            return
        with self.path.open("a") as handle:
            handle.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self.trackers:
            tracker.log(flat(values), step=step)

    def read(self, upto: int) -> list[dict[str, Any]]:
        """The whole lines up to a step; a kill may have cut the last one short."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        read = [json.loads(line) for line in lines if line.endswith("\n")]
        return [line for line in read if line["step"] <= upto]

    def restart(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Go on after these lines."""
        if self.first:  # aside and renamed: a full disk must not take the log away
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
            temporary.replace(self.path)

    def close(self) -> None:
        """Let trackers write what they hold."""
        for tracker in self.trackers:
            tracker.finish()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested values, named as `validation/error/x`; truth values and lists are left out."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError on a tracker that accelerate does not know, or whose package is not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"unknown tracker '{name}'", fix=nearest(name, LOGGER_TYPE_TO_CLASS))
        if name not in installed:
            listing = ", ".join(sorted(installed)) or "none"
            raise InputError(f"no tracker '{name}' is installed", fix=f"pip install {name}; installed: {listing}")


def open_trackers(names: Sequence[str], out: Path) -> list[Any]:
    """Trackers of accelerate, by name, begun for a run. Raises InputError on one that is missing or does not start."""
    check_trackers(names)
    if not names:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    made = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        try:
            tracker = kind(out.name, **({"logging_dir": out} if kind.requires_logging_directory else {}))
            if hasattr(tracker, "start"):
                tracker.start()
        except Exception as error:  # of another package: no account, no network, no permission
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"tracker '{name}' does not start ({reason})", fix="leave it out of trackers") from error
        made.append(tracker)
    return made
