"""What a large cohort asks of Dask: the task graph of ``monai-vslp cohort`` with fake slides on real worker processes.

    python benchmarks/cohort_graph.py --slides 3000 --workers 2

Runs the executor that cohorts use, once with slides of one task and once with slides of several parts, and measures overhead
and transitions per task, how many tasks the scheduler holds at a time, and the memory of scheduler and client (one process
here). Then it measures what a scheduler holds per task when a graph is submitted as a whole, which the bounded window avoids.
Prints JSON; docs/cohort.md has figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import time
from typing import Any

import psutil

from monai_vslp.workflows.executors import Call, DaskExecutor, Work, make_executor

SLIDES_AT_SCALE = 100_000
TILES_PER_SLIDE = 1_000


def fake(seconds: float) -> dict[str, Any]:
    """The result of a slide, in its true size."""
    time.sleep(seconds)
    return {"status": "done", "tiles": TILES_PER_SLIDE, "seconds": seconds, "attempts": 1}


def memory() -> float:
    """Resident memory of this process, MB."""
    gc.collect()
    return psutil.Process().memory_info().rss / 1e6


def works(slides: int, parts: int, seconds: float, name: str) -> list[Work]:
    """Fake slides with arguments as long as real ones have."""
    padding = "/some/folder/of/slides/" + "x" * 60
    return [
        Work(
            f"{name}-{i}",
            Call(f"{name}_slide-{padding}-{i}", fake, (seconds,)),
            tuple(Call(f"{name}_part-{padding}-{i}-{k}", fake, (seconds,)) for k in range(parts)),
        )
        for i in range(slides)
    ]


def run(executor: DaskExecutor, slides: int, parts: int, seconds: float, name: str) -> dict[str, float]:
    """Run fake slides through the executor."""
    scheduler = executor._cluster.scheduler
    todo, before, most, transitions = works(slides, parts, seconds, name), memory(), 0, scheduler.transition_counter
    cpu, started = time.process_time(), time.perf_counter()
    peak = before
    for i, outcome in enumerate(executor.run(todo)):
        if outcome.error is not None:
            raise outcome.error
        most = max(most, len(scheduler.tasks))
        if i % 100 == 0:
            peak = max(peak, psutil.Process().memory_info().rss / 1e6)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    tasks = slides * (parts + 1)
    return {
        "slides": slides,
        "tasks": tasks,
        "wall_s": round(wall, 2),
        "tasks_per_s": round(tasks / wall, 1),
        "overhead_ms_per_task": round(1e3 * (wall * executor.threads / tasks - seconds), 3),
        "scheduler_and_client_cpu_ms_per_task": round(1e3 * cpu / tasks, 3),
        "transitions_per_task": round((scheduler.transition_counter - transitions) / tasks, 2),
        "most_tasks_at_the_scheduler": most,
        "memory_before_MB": round(before, 1),
        "memory_peak_MB": round(peak, 1),
        "memory_after_MB": round(memory(), 1),
    }


def whole_graph(executor: DaskExecutor, tasks: int) -> dict[str, float]:
    """Memory of scheduler and client per task where all tasks are submitted at once; none of them gets to run."""
    before = memory()
    gate = executor.client.submit(fake, 0.0, key="gate", workers=["nobody"])  # so that the others wait for good
    futures = executor.client.map(lambda _, i: i, [gate] * tasks, range(tasks), key="whole", pure=False)
    deadline = time.monotonic() + 120
    while len(executor._cluster.scheduler.tasks) < tasks and time.monotonic() < deadline:
        time.sleep(0.1)
    held = len(executor._cluster.scheduler.tasks)
    after = memory()
    executor.client.cancel([gate], force=True)
    del futures
    return {"tasks": held, "memory_kB_per_task": round(1e3 * (after - before) / held, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slides", type=int, default=2000)
    parser.add_argument("--parts", type=int, default=8, help="parts per slide in the second run")
    parser.add_argument("--seconds", type=float, default=0.0, help="that a fake call takes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--whole", type=int, default=20_000, help="tasks of the graph that is submitted as a whole")
    options = parser.parse_args()
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    found: dict[str, Any] = {"workers": options.workers}
    with make_executor(workers=options.workers) as executor:
        list(executor.run(works(20, 0, 0.0, "warm")))
        found["one task per slide"] = one = run(executor, options.slides, 0, options.seconds, "one")
        found[f"{options.parts} parts per slide"] = run(
            executor, max(1, options.slides // (options.parts + 1)), options.parts, options.seconds, "parts"
        )
        found["graph as a whole"] = whole = whole_graph(executor, options.whole)
    found["100,000 slides"] = {
        "client_and_scheduler_cpu_s": round(one["scheduler_and_client_cpu_ms_per_task"] * SLIDES_AT_SCALE / 1e3, 1),
        "overhead_s_with_100_workers": round(one["overhead_ms_per_task"] * SLIDES_AT_SCALE / 1e3 / 100, 1),
        "scheduler_GB_if_all_tiles_were_tasks_at_once": round(
            whole["memory_kB_per_task"] * SLIDES_AT_SCALE * TILES_PER_SLIDE / 1e6, 1
        ),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
