"""What a check of a cohort found, as text for a terminal."""

from __future__ import annotations

import textwrap

from monai_vslp.data.checks import LEVELS, CohortCheck, Finding

__all__ = ["format_check"]

WIDTH = 120  # characters of a line
WHERE_WIDTH = 18
MOST_ROWS = 4
TITLES = {"error": "ERROR", "warning": "WARNING", "note": "note"}


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _where(finding: Finding) -> str:
    rows = sorted(set(finding.rows))
    if not rows:
        return ""
    more = f" +{len(rows) - MOST_ROWS}" if len(rows) > MOST_ROWS else ""
    return f"row{'' if len(rows) == 1 else 's'} {', '.join(map(str, rows[:MOST_ROWS]))}{more}"


def _classes(check: CohortCheck) -> list[str]:
    width = max(map(len, (*check.classes, "class")))
    lines = [f"  {'class'.ljust(width)}  training images with it   mean   from     to"]
    for name, row in check.classes.items():
        values = (f"{100 * row[key]:5.1f} %" for key in ("mean", "lowest", "highest"))
        lines.append(f"  {name.ljust(width)}  {row['occurs_in']:>23}" + "".join(value.rjust(8) for value in values))
    return lines


def format_check(check: CohortCheck) -> str:
    """The findings as a table, errors first, under a summary of the cohort.

    Args:
        check: what :func:`~monai_vslp.data.checks.check_cohort` found.

    Returns:
        Lines of at most 120 characters where names are not longer.
    """
    counts = check.counts
    lines = [f"{check.table}, images in {check.images}"]
    if counts:
        splits = ", ".join(f"{counts[name]} {name}" for name in ("train", "val", "test") if counts.get(name))
        patients = _count(counts["patients"], "patient") if counts["patients"] else "patients not named"
        lines.append(f"{_count(counts['images'], 'image')} ({splits}), {patients}")
    if check.mpp:
        lines.append(f"{', '.join(f'{value:g}' for value in check.mpp)} µm/px in training")
    if check.classes:
        lines += ["", *_classes(check)]
    shown = [finding for level in LEVELS for finding in check.findings if finding.level == level]
    if shown:
        lines.append("")
    for finding in shown:
        text = finding.message + (f". {finding.advice}" if finding.advice else "")
        head = f"{TITLES[finding.level]:<8} {_where(finding):<{WHERE_WIDTH}} "
        if len(head) > 8 + WHERE_WIDTH + 2:  # many rows: they get a line of their own
            lines.append(head.rstrip())
            head = " " * (8 + WHERE_WIDTH + 2)
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=head, subsequent_indent=" " * (8 + WHERE_WIDTH + 2), break_long_words=False
        )
    errors, warnings = check.count("error"), check.count("warning")
    if errors:
        verdict = "Mend the errors before training."
    elif warnings:
        verdict = "Training will run; the warnings say where its result will suffer."
    else:
        verdict = "Nothing is wrong."
    lines += ["", f"{_count(errors, 'error')}, {_count(warnings, 'warning')}. {verdict}"]
    return "\n".join(lines)
