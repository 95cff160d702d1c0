"""Passes over windows by workers: the bytes of one process, whoever works, and whoever dies on the way."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from monai_vslp.utils.errors import InputError
from monai_vslp.variational import outofcore
from monai_vslp.variational import passes as module
from monai_vslp.variational.outofcore import refine_store
from monai_vslp.variational.passes import ExecutorPasses, ProcessPasses, SerialPasses, window_groups, write_from
from monai_vslp.variational.solver import Problem, StoppingRule, minimize
from monai_vslp.variational.windows import DiskArray, split_windows

zarr = pytest.importorskip("zarr")

SHAPE = (130, 110)  # two grids
P = [0.5, 0.3, 0.2]
OPTIONS = {"window": (32, 48), "max_iterations": 4, "tolerance": 1e-12, "u_dtype": "float32", "energy_dtype": "float32"}


def store(path, values, chunks):
    array = zarr.create_array(str(path), shape=values.shape, chunks=chunks, dtype=values.dtype)
    array[...] = values
    return path


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """Confidences, mass with a hole and weights, in chunks that no window suits."""
    folder, rng = tmp_path_factory.mktemp("maps"), np.random.default_rng(0)
    coarse = torch.from_numpy(rng.normal(size=(1, 3, 6, 6)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, SHAPE, mode="bicubic")[0].numpy()
    q = np.exp(1.5 * smooth + rng.normal(size=smooth.shape).astype(np.float32))
    mass = rng.uniform(0.5, 1, SHAPE).astype(np.float32)
    mass[40:60, 50:90] = 0
    return {
        "confidence": store(folder / "q.zarr", q / q.sum(axis=0), (3, 50, 40)),
        "mass": store(folder / "m.zarr", mass, (37, 50)),
        "weight": store(folder / "w.zarr", rng.uniform(0.3, 1, SHAPE).astype(np.float32), (64, 64)),
    }


def refined(maps, output, passes=None, **options):
    result = refine_store(**maps, output=output, proportions=P, passes=passes, **{**OPTIONS, **options})
    group = zarr.open_group(str(output), mode="r")
    names = ("u", "labels", "fidelity_energy", "regularization_energy")
    return result, {name: group[name][...].tobytes() for name in names}


@pytest.fixture(scope="module")
def serial(maps, tmp_path_factory):
    return refined(maps, tmp_path_factory.mktemp("serial") / "out.zarr")


def assert_same(found, expected):
    (one, arrays), (two, wanted) = found, expected
    assert arrays == wanted
    assert one.energies == two.energies
    assert torch.equal(one.psi, two.psi) and torch.equal(one.proportions, two.proportions)
    assert (one.residual, one.reason) == (two.residual, two.reason)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Groups of few windows, so that a small map makes several tasks."""
    monkeypatch.setattr(module, "SMALLEST_GROUP", 4000)


@pytest.fixture(scope="module")
def two():
    with ProcessPasses(2) as passes:
        yield passes


class Deadly:
    """Passes in some of which a worker is killed, by a task, after it wrote some of its windows."""

    def __init__(self, passes, folder, deadly):
        self.passes, self.folder, self.deadly, self.count = passes, folder, deadly, 0

    def map(self, function, windows, *args):
        self.count += 1
        if self.count not in self.deadly:
            return self.passes.map(function, windows, *args)
        mark = self.folder / f"{self.count}-{function.__name__}"
        return self.passes.map(killed_once, windows, windows[-1], mark, function, *args)


def killed_once(window, last, mark, function, *args):
    result = function(window, *args)
    if window == last and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return result


@pytest.mark.slow
def test_three_processes_give_the_bytes_of_one(maps, serial, tmp_path):
    with ProcessPasses(3) as passes:
        assert_same(refined(maps, tmp_path / "out.zarr", passes), serial)
        assert len(passes._executor._processes) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.zarr"]


def test_a_worker_of_two_is_killed_and_nothing_changes(maps, serial, tmp_path, two, caplog):
    (tmp_path / "marks").mkdir()
    deadly = Deadly(two, tmp_path / "marks", {12})
    assert_same(refined(maps, tmp_path / "out.zarr", deadly), serial)
    assert deadly.count > 30 and len(list((tmp_path / "marks").iterdir())) == 1
    assert "a worker died in attempt 1 of 3" in caplog.text
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["marks", "out.zarr"]


@pytest.mark.slow
def test_one_process_gives_the_same_bytes_and_leaves_nothing_if_it_dies_too_often(maps, serial, tmp_path):
    (tmp_path / "marks").mkdir()
    with ProcessPasses(1, attempts=1) as passes:
        assert_same(refined(maps, tmp_path / "out.zarr", passes), serial)
        shutil.rmtree(tmp_path / "out.zarr")
        with pytest.raises(RuntimeError, match="died in 1 of 1 attempts .* use fewer workers"):
            refined(maps, tmp_path / "out.zarr", Deadly(passes, tmp_path / "marks", {20}))
    assert [entry.name for entry in tmp_path.iterdir()] == ["marks"]


@pytest.mark.slow
def test_dask_gives_the_bytes_of_one_process(maps, serial, tmp_path):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        with ExecutorPasses(client.get_executor) as passes:
            assert_same(refined(maps, tmp_path / "out.zarr", passes), serial)
        pids = client.run(os.getpid)
        assert len(set(pids.values())) == 2 and os.getpid() not in pids.values()


class Again(Executor):
    """Runs every task twice and hands back what the second run found, as after a worker that was lost at the end."""

    def __init__(self):
        self.tasks = 0

    def submit(self, fn, /, *args):
        self.tasks += 1
        fn(*args)
        done = Future()
        done.set_result(fn(*args))
        return done

    def shutdown(self, wait=True):
        pass


def test_no_pass_reads_what_it_writes(maps, serial, tmp_path):
    executor = Again()
    assert_same(refined(maps, tmp_path / "out.zarr", ExecutorPasses(lambda: executor)), serial)
    assert executor.tasks > 100


@pytest.mark.parametrize("groups", [1, 3, 1000])
def test_groups_and_threads_do_not_matter(maps, serial, tmp_path, groups):
    torch.set_num_threads(2)  # a task has one all the same
    try:
        with ExecutorPasses(partial(ThreadPoolExecutor, 2), groups=groups) as passes:
            found = refined(maps, tmp_path / "out.zarr", passes)
    finally:
        torch.set_num_threads(1)
    assert_same(found, serial)


def test_errors_are_those_of_one_process(tmp_path, two):
    """The first in the order of the windows, and nothing runs or lies about afterwards."""
    q = np.full((3, 200, 100), 1 / 3, np.float32)
    q[1, 60, 7] = q[2, 190, 9] = np.nan
    bad = store(tmp_path / "bad.zarr", q, (3, 20, 20))
    with pytest.raises(InputError, match="confidence has negative, NaN .* row 60, column 7"):
        refine_store(bad, tmp_path / "out.zarr", P, passes=two)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.zarr"]
    with pytest.raises(InputError, match="give maps as paths"):
        two.map(lambda window: None, split_windows((4, 4), (2, 2)))
    mass = torch.full((4, 4), 1 / 16)
    problem = Problem(torch.zeros(2, 4, 4), mass, 0.1, None, None, split_windows((4, 4), (2, 2)))
    with pytest.raises(InputError, match="in memory cannot be shared"):
        minimize(problem, torch.empty, StoppingRule(), passes=two)
    for wrong in (0, 1.5, True):
        with pytest.raises(InputError, match="whole number from 1"):
            ProcessPasses(wrong)
    with pytest.raises(InputError, match="at least 1 group"):
        ExecutorPasses(ThreadPoolExecutor, groups=0)


def test_groups_keep_the_order_and_are_alike_in_size(monkeypatch):
    monkeypatch.undo()
    windows = split_windows((10000, 7000), (256, 256))
    groups = window_groups(windows)
    assert [window for group in groups for window in group] == windows
    assert len(groups) == 64
    pixels = [sum((r.stop - r.start) * (c.stop - c.start) for r, c in (w.core for w in group)) for group in groups]
    assert max(pixels) - min(pixels) <= 2 * 256**2
    small = window_groups(split_windows((1024, 1024), (256, 256)))
    assert [len(group) for group in small] == [4, 4, 4, 4]
    assert window_groups([]) == []


def write_columns(window, array, value):
    for _ in range(30):
        array[(slice(None), *window.core)] = torch.full((3, *[s.stop - s.start for s in window.core]), value(window))


def column(window):
    return float(window.core[1].start)


def test_parts_of_one_block_can_be_written_at_once(tmp_path, monkeypatch, two):
    """Processes write interleaved columns of the same blocks: a write touches no byte beside its own."""
    monkeypatch.setattr(module, "SMALLEST_GROUP", 1)
    array = DiskArray(tmp_path / "a.f32", (3, 90, 64), (40, 64))
    windows = split_windows((90, 64), (90, 4))
    two.map(write_columns, windows, array, column)
    expected = torch.arange(0, 64, 4).repeat_interleave(4).float().expand(3, 90, 64)
    assert torch.equal(array[:, :, :], expected)


def test_windows_of_a_pass_on_scratch_files_are_blocks(tmp_path, monkeypatch):
    """What the solver writes is whole blocks, on both grids; tiles of the inputs alone are not."""
    written = []
    write = DiskArray.__setitem__

    def look(self, key, value):
        aligned = all(
            part.start % side == 0 and (part.stop % side == 0 or part.stop == length)
            for part, side, length in zip(key[-2:], self.block, self.shape[-2:])
        )
        written.append((self.shape, aligned))
        write(self, key, value)

    monkeypatch.setattr(DiskArray, "__setitem__", look)
    monkeypatch.setattr(outofcore, "TILE_VALUES", 6000)
    q = np.full((3, 150, 130), 1 / 3, np.float32)
    refine_store(store(tmp_path / "q.zarr", q, (3, 41, 41)), tmp_path / "out.zarr", P, **OPTIONS)
    start = next(i for i, (shape, _) in enumerate(written) if shape == (3, 75, 65))  # the inputs are read
    assert not all(aligned for _, aligned in written[:start])
    assert len(written) > start + 50 and all(aligned for _, aligned in written[start:])


def test_the_default_is_a_loop():
    windows = split_windows((5, 4), (2, 4))
    assert SerialPasses().map(lambda window, add: window.core[0].start + add, windows, 1) == [1, 3, 5]
    source, target = torch.rand(3, 5, 4), torch.zeros(3, 5, 4)
    assert SerialPasses().map(write_from, windows, source, target, torch.mul, 2.0) == [None] * 3
    assert torch.equal(target, 2 * source)


KILLED = """
import os, signal, sys
from monai_vslp.variational.outofcore import refine_store
from monai_vslp.variational.passes import ProcessPasses

def die(step):
    if step.pixels == 130 * 110 and step.iteration == 2:
        print("WORKERS", *passes._executor._processes, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    with ProcessPasses(1) as passes:
        q, output, scratch = sys.argv[1:]
        refine_store(q, output, [0.5, 0.3, 0.2], scratch=scratch, window=(32, 48), on_step=die, passes=passes)
"""


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_a_killed_process_left_is_removed_by_the_next(maps, tmp_path, caplog):
    program, output, scratch = tmp_path / "killed.py", tmp_path / "out[1].zarr", tmp_path / "scratch"
    program.write_text(KILLED)
    command = [sys.executable, str(program), str(maps["confidence"]), str(output), str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers = [int(pid) for pid in done.stdout.split("WORKERS")[1].split()]
    end = time.monotonic() + 20
    while any(map(runs, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert workers and not any(map(runs, workers))  # they do not wait for ever
    assert list(scratch.rglob("*.f32")) and not output.exists()
    others = scratch / f".{output.name}-others"  # of an output of that name elsewhere
    others.mkdir()
    (others / "output").write_text(str(tmp_path / "elsewhere" / output.name))
    refine_store(maps["confidence"], output, P, scratch=scratch, **OPTIONS)
    assert {entry.name for entry in tmp_path.iterdir()} == {program.name, output.name, "scratch"}
    assert list(scratch.iterdir()) == [others]
    assert caplog.text.count("was left by a process that is gone") == 2


def test_two_calls_for_one_output_do_not_meet(maps, tmp_path):
    output, said = tmp_path / "out.zarr", []

    def second(step):
        if not said:
            with pytest.raises(InputError, match="is being written by") as error:
                refine_store(maps["confidence"], output, P, **OPTIONS)
            said.append(str(error.value))

    refined(maps, output, on_step=second)
    assert len(said) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.zarr"]
