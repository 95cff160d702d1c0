"""Dense CRF (SimpleCRF) as a peer; runs in an environment of its own (numpy < 2, SimpleCRF 0.2.1.1).

    /path/to/crf/python benchmarks/crf_peer.py case.npz result.npz [--repeats 3]

Reads ``image`` (uint8 ``[H, W, 3]``) and ``probabilities`` (float32 ``[H, W, C]``); writes per parameter set ``labels``
(``[sets, H, W]``), the median ``seconds`` (``[sets]``) and the sets' ``names``.
"""

from __future__ import annotations

import argparse
import statistics
import time

import denseCRF
import numpy as np

# (weight, position px, colour) of the bilateral kernel, (weight, position px) of the spatial kernel, mean-field steps.
PARAMETERS = {
    "documented: bilateral 10/80/13, spatial 3/3": (10.0, 80.0, 13.0, 3.0, 3.0, 5.0),
    "wide colour: bilateral 10/80/30, spatial 3/3": (10.0, 80.0, 30.0, 3.0, 3.0, 10.0),
    "wider colour, weak: bilateral 1/10/60, spatial 3/5": (1.0, 10.0, 60.0, 3.0, 5.0, 10.0),
    "spatial only 3/5": (0.0, 80.0, 13.0, 3.0, 5.0, 10.0),
    "spatial only 10/3": (0.0, 80.0, 13.0, 10.0, 3.0, 10.0),
    "spatial only 10/5": (0.0, 80.0, 13.0, 10.0, 5.0, 10.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("result")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with np.load(options.case) as case:
        image = np.ascontiguousarray(case["image"], dtype=np.uint8)
        probabilities = np.ascontiguousarray(case["probabilities"], dtype=np.float32)
    labels, seconds = [], []
    for parameters in PARAMETERS.values():
        times = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            result = denseCRF.densecrf(image, probabilities, parameters)
            times.append(time.perf_counter() - start)
        labels.append(np.asarray(result).astype(np.int64))
        seconds.append(statistics.median(times))
    np.savez(options.result, labels=np.stack(labels), seconds=np.array(seconds), names=np.array(list(PARAMETERS)))


if __name__ == "__main__":
    main()
