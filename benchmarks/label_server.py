"""From a moved proportion to a redrawn region over HTTP: the real MONAI Label server, in its own environment.

    bash scripts/setup_label.sh
    OMP_NUM_THREADS=2 python benchmarks/label_server.py [--size 1024] [--classes 5] [--moves 9]

The server serves the bundle ``pathology_segmentation_refinement`` over confidences in a file. What is timed is the whole
request, from sending the proportions to the last byte of the PNG; the server's share without the solver follows from
``label_interactive.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np

from monai_vslp.data.synthetic_labels import reference_case
from monai_vslp.utils.atomic import write_json
from monai_vslp.workflows.bundle import read_config

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "pathology_segmentation_refinement"
PATIENCE = 180.0  # s until the server has to answer


@contextlib.contextmanager
def serving(python: Path, model: Path, studies: Path, log: Path):
    """Address of a server on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "monai_vslp", "label", "--model", f"refinement={model}", "--studies", studies, "--port", port]
    with open(log, "w") as file:
        server = subprocess.Popen([str(word) for word in command], stdout=file, stderr=file, cwd=log.parent)
    address, started = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while True:
            if server.poll() is not None or time.monotonic() > started + PATIENCE:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/info/", timeout=PATIENCE):
                break
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="side of the region in px")
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--moves", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-label" / "bin" / "python", help="of the server")
    options = parser.parse_args()
    _, confidence, proportions = reference_case(options.size, options.classes, options.seed)
    names = [f"class {k}" for k in range(options.classes)]
    with tempfile.TemporaryDirectory() as folder:
        model, studies = Path(folder) / "bundle", Path(folder) / "studies"
        shutil.copytree(BUNDLE, model)
        config = read_config(model, "inference.json")
        write_json(model / "configs" / "inference.json", config | {"classes": names, "colors": None})
        studies.mkdir()
        np.save(studies / "region.npy", confidence.numpy())
        with serving(options.python, model, studies, Path(folder) / "server.txt") as address:

            def answer(**parameters: object) -> tuple[float, bytes]:
                data = urllib.parse.urlencode({"params": json.dumps({"regularizer": "tv"} | parameters)}).encode()
                request = urllib.request.Request(f"{address}/infer/refinement?image=region", data)
                started = time.perf_counter()
                with urllib.request.urlopen(request, timeout=PATIENCE) as found:
                    content = found.read()
                return time.perf_counter() - started, content

            given = dict(zip(names, proportions.tolist()))
            answer(proportions=given)  # reads the file and the model
            anew = statistics.median(answer(proportions=given, cold=True)[0] for _ in range(3))
            moves = [answer(move={names[k % len(names)]: 0.1 + 0.05 * (k % 3)}) for k in range(options.moves)]
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    times = [seconds for seconds, _ in moves]
    machine = platform.processor() or platform.machine()
    print(f"{machine}, OMP_NUM_THREADS={threads}, {options.size}² px, {options.classes} classes\n")
    print("| request | median s | slowest s | kB |\n|---|---|---|---|")
    print(f"| anew | {anew:.2f} | | |")
    print(f"| moved proportion | {statistics.median(times):.2f} | {max(times):.2f} | {len(moves[-1][1]) / 1e3:.0f} |")


if __name__ == "__main__":
    main()
