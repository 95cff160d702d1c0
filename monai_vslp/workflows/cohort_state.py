"""What is known on disk about each slide of a cohort, and the tables that are made of it."""

from __future__ import annotations

import csv
import json
import logging
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from monai_vslp.data.slide_table import SlideRecord
from monai_vslp.io.summary import read_summary
from monai_vslp.utils.atomic import atomic_path, write_json
from monai_vslp.utils.errors import InputError

__all__ = [
    "FAILED_NAME",
    "STATE_NAME",
    "TABLE_NAME",
    "EventLog",
    "SlideState",
    "cohort_rows",
    "write_cohort_table",
    "write_failed",
]

STATE_NAME, FAILED_NAME, TABLE_NAME = "state.json", "failed.csv", "cohort.csv"
STATUSES = ("pending", "running", "done", "failed")
FAILED_COLUMNS = ("slide", "reason", "step", "attempts", "time")

logger = logging.getLogger(__name__)


def now() -> str:
    """The time in UTC, ISO 8601, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class SlideState:
    """``state.json`` of one slide. A slide without the file is pending.

    Attributes:
        slide: stem of the file.
        status: ``pending``, ``running``, ``done`` or ``failed``. One whose process died stays ``running``; its lock tells.
        fingerprint: of input, network and settings; "" where the input could not be looked at.
        attempts: how often it was begun with this fingerprint.
        host, pid: where, of the last attempt.
        since: when it came to be so, ISO 8601, UTC.
        step: what failed: ``check`` (before anything ran), ``open``, ``segment``, ``write`` or ``worker`` (processes died).
        reason: why, for people.
        detail: traceback of an error that nobody expected.
        tiles: how many there are.
        seconds: how long it took.
    """

    slide: str
    status: str = "pending"
    fingerprint: str = ""
    attempts: int = 0
    host: str = ""
    pid: int | None = None
    since: str = ""
    step: str = ""
    reason: str = ""
    detail: str = ""
    tiles: int | None = None
    seconds: float | None = None

    @classmethod
    def read(cls, folder: str | Path) -> SlideState:
        """The state of the slide whose outputs are in ``folder``; one that is damaged is said to be, and counts as pending."""
        path = Path(folder) / STATE_NAME
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            state = cls(**{field.name: value[field.name] for field in fields(cls) if field.name in value})
            if state.status not in STATUSES:
                raise ValueError(f"status is {state.status!r}")
            return replace(state, slide=path.parent.name)
        except FileNotFoundError:
            pass
        except (ValueError, TypeError) as error:
            logger.warning("%s is damaged (%s); the slide counts as pending.", path, error)
        return cls(path.parent.name)

    def write(self, folder: str | Path) -> SlideState:
        """Write ``state.json`` atomically, with the time."""
        state = replace(self, since=now())
        write_json(Path(folder) / STATE_NAME, asdict(state))
        return state

    def begin(self, fingerprint: str) -> SlideState:
        """The next attempt, by this process."""
        attempts = self.attempts if self.fingerprint == fingerprint else 0
        return SlideState(self.slide, "running", fingerprint, attempts + 1, socket.gethostname(), os.getpid())

    def fail(self, step: str, reason: str, detail: str = "", fingerprint: str | None = None) -> SlideState:
        """This attempt, failed."""
        mark = self.fingerprint if fingerprint is None else fingerprint
        return replace(self, status="failed", step=step, reason=reason, detail=detail, fingerprint=mark)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_failed(output: Path, states: Iterable[SlideState]) -> Path:
    """Write ``failed.csv`` from nothing but states, by name of slide; no file where none failed.

    Returns:
        Its path.
    """
    path = output / FAILED_NAME
    failed = sorted((state for state in states if state.status == "failed"), key=lambda state: state.slide)
    if not failed:
        path.unlink(missing_ok=True)
        return path
    rows = ({**{name: getattr(state, name) for name in FAILED_COLUMNS[:-1]}, "time": state.since} for state in failed)
    return _write_csv(path, FAILED_COLUMNS, rows)


def cohort_rows(output: Path, records: Iterable[SlideRecord], classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row per slide of the table, in its order.

    Returns:
        ``slide``, ``status``, ``given``, ``network`` and ``refined`` (fractions by class, None where unknown), ``difference``
        (half the sum of the absolute differences of given and network: the share of tissue on which they differ), ``psi`` (by
        class, nats), ``tiles``, ``seconds``, ``attempts``, ``reason``.
    """
    rows = []
    for record in records:
        state = SlideState.read(output / record.stem)
        row: dict[str, Any] = {
            "slide": record.stem, "status": state.status, "given": None, "network": None, "refined": None, "difference": None,
            "psi": None, "tiles": state.tiles, "seconds": state.seconds, "attempts": state.attempts, "reason": state.reason,
        }  # fmt: skip
        if record.proportions is not None:
            row["given"] = dict(zip(classes, record.proportions.mean.tolist()))
        if state.status == "done":
            try:
                summary = read_summary(output / record.stem)
            except InputError as error:
                row |= {"status": "pending", "reason": str(error)}
            else:
                found = summary["proportions"]
                row |= {"network": found["confidence"], "refined": found["refined"], "psi": summary["psi"]}
                if row["given"] is not None and all(found["confidence"].get(name) is not None for name in classes):
                    row["difference"] = sum(abs(row["given"][name] - found["confidence"][name]) for name in classes) / 2
        rows.append(row)
    return rows


def write_cohort_table(output: Path, rows: Iterable[Mapping[str, Any]], classes: Sequence[str]) -> Path:
    """Write ``cohort.csv``: the rows of :func:`cohort_rows`, proportions and ψ as columns ``<what>_<class>``."""
    groups = ("given", "network", "refined")
    columns = [
        "slide", "status", *(f"{group}_{name}" for group in groups for name in classes), "difference",
        *(f"psi_{name}" for name in classes), "tiles", "seconds", "attempts", "reason",
    ]  # fmt: skip

    def flat(row: Mapping[str, Any]) -> dict[str, Any]:
        values = {key: value for key, value in row.items() if key not in (*groups, "psi")}
        for group in (*groups, "psi"):
            for name in classes:
                value = None if row[group] is None else row[group].get(name)
                values[f"{group}_{name}"] = None if value is None else round(value, 6)
        return values | {"difference": None if row["difference"] is None else round(row["difference"], 6)}

    return _write_csv(output / TABLE_NAME, columns, map(flat, rows))


class EventLog:
    """``log.jsonl``: one JSON object per event, appended by the process that runs the cohort; a context manager.

    Each line is one ``write`` to a file opened for appending, so that two cohorts with one output do not mix their lines, and
    a line that a kill cut short does not spoil the next.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self._handle).st_size
        if size and os.pread(self._handle, 1, size - 1) != b"\n":
            os.write(self._handle, b"\n")

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._handle)

    def write(self, event: str, slide: str | None = None, worker: str | None = None, **numbers: Any) -> None:
        """Append an event; a log that cannot be written (a full disk) is said once more by what follows, and stops nothing."""
        values = {"time": now(), "event": event, "slide": slide, "worker": worker, **numbers}
        line = json.dumps({key: value for key, value in values.items() if value is not None}, ensure_ascii=False)
        try:
            os.write(self._handle, line.encode() + b"\n")
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.path, error)
