"""Locks between real processes: two writers, kill -9, numbers of processes used again, holders that fall silent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from monai_vslp.utils.errors import InputError
from monai_vslp.utils.lock import FolderLock, LockedError, process_start

# Loads the module by its file: the package's own import, torch and all, takes seconds and is not needed here.
LOAD = """
import importlib.util, json, os, sys, time, types
for name in ("monai_vslp", "monai_vslp.utils"):
    sys.modules[name] = types.ModuleType(name)
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
load("monai_vslp.utils.errors", {errors!r})
lock = load("monai_vslp.utils.lock", {lock!r})
"""


def start(program: str) -> subprocess.Popen:
    from monai_vslp.utils import errors, lock

    text = LOAD.format(errors=errors.__file__, lock=lock.__file__) + program
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def hold(folder, stale_after=60.0) -> subprocess.Popen:
    """A process that holds the lock until it is told to end."""
    process = start(
        f"held = lock.FolderLock({str(folder)!r}, {stale_after}).acquire()\nprint('held', flush=True)\nsys.stdin.readline()\n"
        "try:\n    held.check(); print('kept', flush=True)\n"
        "except lock.LockedError as error:\n    print('lost', error, flush=True)\n"
        "held.release()\n"
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_told_who_and_since_when(tmp_path):
    holder = hold(tmp_path / "slide")
    try:
        with pytest.raises(LockedError, match=rf"process {holder.pid} on .* since \d{{4}}-\d\d-\d\d .*Wait until it is done"):
            FolderLock(tmp_path / "slide").acquire()
    finally:
        out, _ = holder.communicate("end\n", timeout=20)
    assert out == "kept\n"
    with FolderLock(tmp_path / "slide") as lock:
        assert lock.holder().pid == os.getpid()
        lock.check()
    assert list(tmp_path.iterdir()) == [], "nothing is left beside the folder"


def test_kill_9_of_the_holder_frees_the_lock_at_once(tmp_path):
    holder = hold(tmp_path / "slide")
    holder.send_signal(signal.SIGKILL)
    while process_start(holder.pid) is not None:  # a zombie until it is waited for; that counts as dead
        time.sleep(0.01)
    assert os.path.exists(f"/proc/{holder.pid}")
    with FolderLock(tmp_path / "slide", stale_after=3600) as lock:
        assert lock.holder().pid == os.getpid()
    holder.wait()


def test_the_number_of_a_dead_process_used_again_does_not_fool_it(tmp_path):
    """The file names a living process by its number, this one, but with another start."""
    lock = FolderLock(tmp_path / "slide").acquire()
    mine = lock.holder()
    lock.release()
    file = tmp_path / ".slide.lock"
    file.write_text(json.dumps(asdict(replace(mine, token="old"))))
    with pytest.raises(LockedError):
        lock.acquire()
    file.write_text(json.dumps(asdict(replace(mine, token="old", started=mine.started - 1))))
    with lock:
        assert lock.holder().token != "old"


def test_a_lock_of_another_host_is_stale_without_signs_of_life_only(tmp_path):
    lock = FolderLock(tmp_path / "slide", stale_after=100).acquire()
    other = replace(lock.holder(), host="node7", machine="another boot", pid=2**22 + 1, token="theirs")
    lock.release()
    file = tmp_path / ".slide.lock"
    file.write_text(json.dumps(asdict(other)))
    with pytest.raises(LockedError, match="on node7"):
        lock.acquire()
    past = time.time() - 101
    os.utime(file, (past, past))
    with lock:
        assert lock.holder().host != "node7"


def test_a_holder_that_fell_silent_is_overtaken_and_learns_it(tmp_path):
    holder = hold(tmp_path / "slide", stale_after=0.8)
    time.sleep(1.2)
    with pytest.raises(LockedError):
        FolderLock(tmp_path / "slide", stale_after=0.8).acquire()  # its heart beats, however long it holds
    holder.send_signal(signal.SIGSTOP)
    time.sleep(1.2)
    lock = FolderLock(tmp_path / "slide", stale_after=0.8).acquire()
    token = lock.holder().token
    holder.send_signal(signal.SIGCONT)
    out, _ = holder.communicate("end\n", timeout=20)
    assert out.startswith("lost") and f"process {os.getpid()}" in out
    assert lock.holder().token == token, "the loser's release leaves the new lock alone"
    lock.check()
    lock.release()


def test_a_file_without_content_is_believed_until_it_is_old(tmp_path):
    """A process killed between making the file and writing it."""
    file = tmp_path / ".slide.lock"
    file.touch()
    lock = FolderLock(tmp_path / "slide", stale_after=50)
    with pytest.raises(LockedError, match="has just begun"):
        lock.acquire()
    os.utime(file, (1, 1))
    with lock:
        lock.check()


def test_many_processes_after_one_stale_lock_never_write_at_once(tmp_path):
    """Each adds one to a number without any care, under the lock; a lost update would show."""
    holder = hold(tmp_path / "slide")
    holder.kill()
    holder.wait()
    number, rounds, count = tmp_path / "number", 25, 4
    number.write_text("0")
    program = f"""
done = 0
while done < {rounds}:
    try:
        with lock.FolderLock({str(tmp_path / "slide")!r}) as held:
            value = int(open({str(number)!r}).read())
            time.sleep(0.0005)
            open({str(number)!r}, "w").write(str(value + 1))
            if done % 5 == 0:  # die as kill -9 does, as far as the file can tell: a stale lock for the others
                held._stop.set()
                record = held.holder().__dict__ | {{"started": 1}}
                held._mine = lock.LockHolder(**record)
                open(held.file, "w").write(json.dumps(record))
                held._mine = None
        done += 1
    except lock.LockedError:
        time.sleep(0.001)
"""
    others = [start(program) for _ in range(count)]
    assert [process.wait(timeout=60) for process in others] == [0] * count
    assert int(number.read_text()) == rounds * count


def test_the_wrong_time_is_refused(tmp_path):
    with pytest.raises(InputError, match="stale_after"):
        FolderLock(tmp_path, stale_after=0)
