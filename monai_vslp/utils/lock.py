"""One writer per folder, between processes and between hosts that share a file system."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from monai_vslp.utils.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderLock", "LockHolder", "LockedError", "process_start"]

STALE_AFTER = 120.0  # seconds without a sign of life
BEATS = 8  # signs of life within that time

logger = logging.getLogger(__name__)


class LockedError(InputError):
    """Another process writes this folder, or took it over; says who and since when."""


@dataclass(frozen=True)
class LockHolder:
    """Who holds a lock.

    Attributes:
        host: name of the machine, for people.
        machine: names one boot of one machine and its process numbers; where it is ours, ``pid`` can be looked up.
        pid: number of the process.
        started: when the process started, clock ticks since the machine booted; None where that cannot be known.
        since: when the lock was taken, seconds since 1970.
        token: random, new for each lock that is taken.
    """

    host: str
    machine: str
    pid: int
    started: int | None
    since: float
    token: str

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} since {when}"


def process_start(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since the boot; None where none runs, or there is no /proc.

    A number of a process is used again one day, so only number and start together name a process.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces
    return None if fields[0] in "ZX" else int(fields[19])  # zombies are dead and only wait to be counted


def _machine() -> str:
    """This boot of this machine, and this container's process numbers."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts) or socket.gethostname()


def _is_dead(holder: LockHolder) -> bool:
    """Whether the holder is a process of this machine that runs no more."""
    if holder.machine != _machine():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # somebody else's process; its start is readable all the same
    return holder.started is not None and process_start(holder.pid) != holder.started


class FolderLock:
    """Keep other processes from writing a folder: a file beside it, ``.<name>.lock``, that one process at a time can make.

    The file says who holds it; a thread of the holder touches it as a sign of life. A lock is stale, and taken over, where
    its process ran on this machine and is gone, or where it gave no sign of life for ``stale_after`` seconds, by the clock
    of the file system. Takeovers follow one another under a kernel lock of the parent folder, which ends with its process,
    and what was moved away is looked at before it is replaced. A holder that was overtaken (a suspended machine, say) learns
    it from :meth:`check`, and its :meth:`release` leaves the new lock alone.

    Args:
        path: the folder; it need not exist, its parent is made.
        stale_after: seconds.

    Example:
        >>> with FolderLock(output / "slide_1") as lock:  # doctest: +SKIP
        ...     write_output(...)
    """

    def __init__(self, path: str | os.PathLike[str], stale_after: float = STALE_AFTER) -> None:
        if not stale_after > 0:
            raise InputError(f"stale_after is a number of seconds above 0, got {stale_after}.")
        self.path, self.stale_after = Path(path).absolute(), float(stale_after)
        self.file = self.path.with_name(f".{self.path.name}.lock")
        self._mine: LockHolder | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> FolderLock:
        return self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """One process at a time; where the file system has no such locks, what :meth:`_remove` looks at has to do."""
        if fcntl is None:
            yield
            return
        handle = os.open(self.file.parent, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                logger.debug("%s has no kernel locks: %s", self.file.parent, error)
            yield
        finally:
            os.close(handle)

    def holder(self) -> LockHolder | None:
        """Who holds the lock now; None for nobody, or where the file is not written yet."""
        return self._read(self.file)

    @staticmethod
    def _read(path: Path) -> LockHolder | None:
        try:
            return LockHolder(**json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _silence(self) -> float:
        """Seconds since the last sign of life, by the clock of the file system, which all hosts share."""
        probe = self.file.with_name(f"{self.file.name}-{secrets.token_hex(8)}")
        try:
            os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return probe.stat().st_mtime - self.file.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _create(self) -> LockHolder | None:
        """Make the file; None where there is one."""
        mine = LockHolder(
            socket.gethostname(), _machine(), os.getpid(), process_start(os.getpid()), time.time(), secrets.token_hex(16)
        )
        try:
            handle = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return None
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(asdict(mine), file)
        except BaseException:
            self.file.unlink(missing_ok=True)
            raise
        return mine

    def _remove(self, holder: LockHolder | None) -> None:
        """Remove the file if it is still that of ``holder``: moved away first, and back if it is not."""
        aside = self.file.with_name(f"{self.file.name}-{secrets.token_hex(8)}")
        try:
            os.rename(self.file, aside)
        except FileNotFoundError:
            return
        if self._read(aside) != holder:
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.file)
        aside.unlink()

    def acquire(self) -> FolderLock:
        """Take the lock, at once or not at all.

        Raises:
            LockedError: a living process holds it.
            OSError: the file cannot be written.
        """
        if self._mine is not None:
            raise RuntimeError(f"{self.file} is held by this object already.")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._guard():
            mine = self._create()
            while mine is None:
                holder = self.holder()
                try:
                    silence = self._silence()
                except FileNotFoundError:  # released just now
                    silence = 0.0
                else:
                    dead = holder is not None and _is_dead(holder)
                    if not dead and silence <= self.stale_after:
                        raise LockedError(
                            f"{self.path} is being written by {holder or 'a process that has just begun'}, with a sign of life "
                            f"{max(silence, 0):.0f} s ago. Wait until it is done, or end it. If it runs no more, try again in "
                            f"{max(self.stale_after - silence, 0) + 1:.0f} s."
                        )
                    why = "runs no more" if dead else f"gave no sign of life for {silence:.0f} s"
                    logger.warning("the lock of %s is taken over from %s, which %s.", self.path, holder, why)
                    self._remove(holder)
                mine = self._create()
        self._mine = mine
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name=f"lock-{self.path.name}", daemon=True)
        self._thread.start()
        return self

    def _beat(self) -> None:
        while not self._stop.wait(self.stale_after / BEATS):
            if self.holder() != self._mine:
                logger.error("the lock of %s was lost to %s.", self.path, self.holder())
                return
            try:
                os.utime(self.file)
            except OSError as error:  # a network file system that is away for a while; check() judges
                logger.warning("no sign of life could be left in %s: %s", self.file, error)

    def check(self) -> None:
        """Make sure that the lock is still ours; to be called before what was made under it is put in place.

        Raises:
            LockedError: another process took it over.
        """
        holder = self.holder()
        if self._mine is None or holder != self._mine:
            raise LockedError(
                f"the lock of {self.path} was lost to {holder or 'nobody (its file is gone)'}: this process gave no sign of "
                f"life for {self.stale_after:g} s. Nothing more is written; run the same command again."
            )

    def release(self) -> None:
        """Give the lock back; one that was lost is left to its new holder."""
        if self._mine is None:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with self._guard():
            if self.holder() == self._mine:
                self._remove(self._mine)
        self._mine = None
