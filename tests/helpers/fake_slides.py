"""Work for executors that imports nothing of the package, so that fresh workers begin at once."""

import os
import signal
import time
from pathlib import Path


def note(folder, name, seconds=0.0, fail=False):
    """Leave a line in ``folder/log`` when begun, sleep, and return the name and the process."""
    with open(Path(folder) / "log", "a") as file:
        file.write(f"{name} {os.getpid()}\n")
    time.sleep(seconds)
    if fail:
        raise ValueError(f"{name} is bad")
    return {"name": name, "pid": os.getpid()}


def begun(folder):
    """Names of the calls of :func:`note` in the order in which they began."""
    path = Path(folder) / "log"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def die(folder, name, times):
    """Kill -9 this process the first ``times`` times, then end well."""
    marks = Path(folder) / f"{name}.deaths"
    with open(marks, "a") as file:
        file.write("x")
    if len(marks.read_text()) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"name": name, "deaths": len(marks.read_text()) - 1}


def part(folder, name, index):
    """Write one part of a piece of work."""
    (Path(folder) / f"{name}-{index}").write_text(str(index))


def gather(folder, name, count):
    """Needs all parts."""
    return sum(int((Path(folder) / f"{name}-{index}").read_text()) for index in range(count))


def slide(tiles, seconds):
    """Time passes, and the result is that of a slide."""
    time.sleep(seconds)
    return {"status": "done", "tiles": tiles, "seconds": seconds, "attempts": 1}
