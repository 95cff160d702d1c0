"""What the proportions of a whole cohort say: which slides stand out, how raters differ, where the network disagrees.

    python examples/cohort_report.py OUT

OUT is the output folder of ``monai-vslp segment`` or ``cohort``; nothing is computed again. Writes ``OUT/report.html`` anew and
``OUT/disagreement.csv``, a row per input, the worst first: the difference between the proportions that were given and
those that the network alone found is what a second look should begin with.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from monai_vslp.io import read_summary
from monai_vslp.io.cohort_statistics import agreement, mean_difference, outlier_bound
from monai_vslp.utils.atomic import atomic_path
from monai_vslp.workflows import report


def cohort_report(folder: Path) -> list[dict[str, str]]:
    """Reports and the list of disagreements.

    Args:
        folder: output folder; an input of which no proportions were given is left out of the list.

    Returns:
        The rows of ``disagreement.csv``: ``input``, ``difference`` (mean absolute, percentage points), ``outlier`` (``yes``
        above the median + 3.5 robust standard deviations, from eight inputs), and given and found percentages by class.
    """
    report(folder)
    summaries = [read_summary(path.parent) for path in sorted(folder.glob("*/summary.json"))]
    rated = [summary for summary in summaries if summary["proportions"].get("given")]
    bound = outlier_bound([mean_difference(summary) for summary in rated])
    rows = []
    for summary in sorted(rated, key=mean_difference, reverse=True):
        difference = mean_difference(summary)
        row = {
            "input": summary["name"],
            "difference": f"{100 * difference:.1f}",
            "outlier": "yes" if bound is not None and difference > bound else "no",
        }
        for name in summary["classes"]:
            row[f"{name} given"] = f"{100 * (summary['proportions']['given'][name] or 0):.1f}"
            row[f"{name} found"] = f"{100 * (summary['proportions']['confidence'][name] or 0):.1f}"
        rows.append(row)
    if rows:
        with atomic_path(folder / "disagreement.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        for name in rated[0]["classes"]:
            pairs = [(s["proportions"]["given"][name] or 0, s["proportions"]["confidence"][name] or 0) for s in rated]
            found = agreement(*zip(*pairs))
            r = "–" if found.correlation is None else f"{found.correlation:.2f}"
            print(f"{name}: bias {100 * found.bias:+.1f}, mean error {100 * found.error:.1f} percentage points, r {r}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="OUT")
    for line in cohort_report(parser.parse_args().folder)[:5]:
        print(line)
