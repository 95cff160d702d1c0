"""Tables and plots of a benchmark: means and spreads over seeds."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.utils.atomic import atomic_path, write_text
from monai_vslp.utils.errors import InputError

__all__ = ["Row", "Spread", "aggregate", "best_rows", "plot", "write_csv", "write_markdown"]

HINT = "{} is needed for plots: pip install matplotlib"
figure_module, _ = optional_import("matplotlib.figure", descriptor=HINT)
agg, _ = optional_import("matplotlib.backends.backend_agg", descriptor=HINT)
lines_module, _ = optional_import("matplotlib.lines", descriptor=HINT)

KEYS = ("data", "noise", "given", "method", "map")
ORDER = (0, 1, 3, 2, 4)  # of the rows: a method's tables given at segmentation stand together
NONE = "none"  # nothing given at segmentation
BOUNDARY, CALIBRATION, ERROR, SECONDS = "boundary F1", "ECE", "proportion error", "training seconds"
LOWER_IS_BETTER = (CALIBRATION, ERROR)
# Okabe and Ito, "Color universal design" (2008): told apart with any colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Spread:
    """Values of one score over seeds.

    Attributes:
        mean: arithmetic mean; None without values.
        sd: sample standard deviation (divisor n - 1); None for fewer than two values.
        n: number of values; scores that are not defined do not count.
    """

    mean: float | None
    sd: float | None
    n: int

    def text(self, digits: int = 3) -> str:
        """``mean ± sd``, the mean alone where there is no spread, a dash where there is nothing."""
        if self.mean is None:
            return "–"
        return f"{self.mean:.{digits}f}" + ("" if self.sd is None else f" ± {self.sd:.{digits}f}")


@dataclass(frozen=True)
class Row:
    """One line of the tables.

    Attributes:
        data, noise, given, method: names in the benchmark's config: data set, table of the training, table given at
            segmentation (``none`` for none), method.
        map: ``argmax`` of the network or ``refined``.
        title: of the method, for people.
        seeds: those that were scored, ascending.
        values: by column (``mIoU <block>`` and ``Dice <class>`` in [0, 1], ``boundary F1``, ``ECE``, ``proportion error`` as
            a fraction, ``training seconds``).
    """

    data: str
    noise: str
    given: str
    method: str
    map: str
    title: str
    seeds: tuple[int, ...]
    values: dict[str, Spread] = field(default_factory=dict)


def _spread(values: Iterable[float | None]) -> Spread:
    found = np.array([value for value in values if value is not None], dtype=np.float64)
    if not found.size:
        return Spread(None, None, 0)
    return Spread(float(found.mean()), float(found.std(ddof=1)) if found.size > 1 else None, int(found.size))


def _columns(result: Mapping[str, Any], kind: str, seconds: float | None) -> dict[str, float | None]:
    """The scores of one map of one evaluation by column."""
    rows = {block["name"]: next(row for row in block["rows"] if row["map"] == kind) for block in result["blocks"]}
    whole = next(iter(rows.values()))  # the first block is that of all classes
    columns = {f"mIoU {name}": row["miou"] for name, row in rows.items()}
    columns |= {f"Dice {name}": value for name, value in whole["dice"].items()}
    columns |= {BOUNDARY: whole["boundary_f1"], CALIBRATION: whole["ece"], ERROR: whole["proportion_error"]}
    return columns | {SECONDS: seconds}


def aggregate(scores: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Means and sample standard deviations over seeds.

    Args:
        scores: one per trained network: ``data``, ``noise``, ``method``, ``title``, ``seed``, ``train_seconds`` (s, or None)
            and ``given``, which has by name of the table given at segmentation the result of
            ``monai-vslp evaluate``.

    Returns:
        A row per data set, noise, table given, method and map, in the order in which they come first.

    Raises:
        InputError: a seed occurs twice under one row.
    """
    collected: dict[tuple[str, ...], dict[int, dict[str, float | None]]] = {}
    titles: dict[tuple[str, str], str] = {}
    for score in scores:
        titles.setdefault((score["data"], score["method"]), score["title"])
        for given, result in score["given"].items():
            for kind in (row["map"] for row in result["blocks"][0]["rows"]):
                key = (score["data"], score["noise"], given, score["method"], kind)
                seeds = collected.setdefault(key, {})
                if score["seed"] in seeds:
                    raise InputError(f"the scores of {'/'.join(key)} have seed {score['seed']} twice; give each run once.")
                seeds[score["seed"]] = _columns(result, kind, score["train_seconds"])
    ranks = [{value: rank for rank, value in enumerate(dict.fromkeys(key[i] for key in collected))} for i in range(len(KEYS))]
    rows = []
    for key in sorted(collected, key=lambda key: [ranks[i][key[i]] for i in ORDER]):
        seeds = dict(sorted(collected[key].items()))
        names = dict.fromkeys(name for columns in seeds.values() for name in columns)
        values = {name: _spread(columns.get(name) for columns in seeds.values()) for name in names}
        rows.append(Row(*key, title=titles[key[0], key[3]], seeds=tuple(seeds), values=values))
    return rows


def _pooled(first: Spread, second: Spread) -> float:
    r"""Pooled standard deviation :math:`\sqrt{\sum_j (n_j-1) s_j^2 / \sum_j (n_j-1)}`; zero where nothing is known of it."""
    freedom = [max(spread.n - 1, 0) for spread in (first, second)]
    total = sum(f * (spread.sd or 0.0) ** 2 for f, spread in zip(freedom, (first, second)))
    return math.sqrt(total / sum(freedom)) if sum(freedom) else 0.0


def best_rows(rows: Sequence[Row], column: str) -> set[int]:
    """Indices of the best of comparable rows.

    The best mean alone where it is ahead of all others by more than the pooled standard deviation of it and the other;
    else all rows that it is not ahead of by that much. Nothing is best where the best mean comes from a single seed: how far
    that is ahead, nobody knows. Nothing is best in training time, or where there is one row alone.

    Args:
        rows: of one data set, noise and table given.
        column: of :attr:`Row.values`.
    """
    found = {i: row.values[column] for i, row in enumerate(rows) if column in row.values and row.values[column].n}
    if column == SECONDS or len(found) < 2:
        return set()
    sign = -1.0 if column in LOWER_IS_BETTER else 1.0
    best = max(found.values(), key=lambda spread: sign * spread.mean)
    if best.sd is None:
        return set()
    return {i for i, spread in found.items() if abs(best.mean - spread.mean) <= _pooled(best, spread) + 1e-12}


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _by_data(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.data, []).append(row)
    return groups


def write_markdown(rows: Sequence[Row], path: str | Path) -> Path:
    """A table per data set: mean ± sd over seeds, the best in bold as :func:`best_rows` says."""
    text = [
        "# Benchmark\n",
        "Mean ± sample standard deviation over n seeds. *Trained with*: table of proportions in training; *given*: table at "
        "segmentation. Bold among the rows of one table in training and one at segmentation: the best, and what it is not "
        "ahead of by more than the pooled standard deviation. ECE and proportion error: lower is better.\n",
    ]
    for data, members in _by_data(rows).items():
        columns = list(dict.fromkeys(name for row in members for name in row.values))
        head = ["trained with", "given", "method", "map", "n", *columns]
        text += [f"## {_cell(data)}\n", f"| {' | '.join(map(_cell, head))} |", f"|{'---|' * 5}{'---:|' * len(columns)}"]
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in members:
            groups.setdefault((row.noise, row.given), []).append(row)
        for group in groups.values():
            bold = {name: best_rows(group, name) for name in columns}
            for index, row in enumerate(group):
                cells = [row.noise, row.given, row.title, row.map, len(row.seeds)]
                for name in columns:
                    value = row.values.get(name, Spread(None, None, 0)).text(1 if name == SECONDS else 3)
                    cells.append(f"**{value}**" if index in bold[name] else value)
                text.append(f"| {' | '.join(map(_cell, cells))} |")
        text.append("")
    if not rows:
        text.append("No run has been scored yet.\n")
    return write_text(path, "\n".join(text))


def write_csv(rows: Sequence[Row], path: str | Path) -> Path:
    """All rows in one table, for each score the columns ``<score>, mean``, ``, sd`` and ``, n``; blank: not defined."""
    columns = list(dict.fromkeys(name for row in rows for name in row.values))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*KEYS, "title", "seeds", *(f"{name}, {part}" for name in columns for part in ("mean", "sd", "n"))])
    for row in rows:
        spreads = [row.values.get(name, Spread(None, None, 0)) for name in columns]
        numbers = ["" if v is None else v for spread in spreads for v in (spread.mean, spread.sd, spread.n)]
        writer.writerow([*(getattr(row, key) for key in KEYS), row.title, " ".join(map(str, row.seeds)), *numbers])
    return write_text(path, stream.getvalue())


def _points(rows: Sequence[Row]) -> list[Row]:
    """Rows to draw: the argmax of the network does not know what is given, so it is drawn once."""
    kept, seen = [], set()
    for row in rows:
        key = (row.noise, row.method, row.map)
        if row.map == "argmax" and key in seen:
            continue
        seen.add(key)
        kept.append(row)
    return kept


def plot(rows: Sequence[Row], path: str | Path, column: str = "mIoU all classes") -> Path:
    """Draw one score with its error bars (sample standard deviation), a panel per data set and a line per method.

    Colours tell the table of the training, markers the table given at segmentation; the argmax of the network, which does not
    depend on that, is a bar. Needs matplotlib.

    Args:
        rows: of :func:`aggregate`.
        path: ends in ``.png``.
        column: of :attr:`Row.values`.

    Raises:
        InputError: there is nothing to draw.
    """
    drawn = [row for row in rows if column in row.values and row.values[column].mean is not None]
    if not drawn:
        raise InputError(f"no row has a value of {column!r} to draw.")
    noises = list(dict.fromkeys(row.noise for row in drawn))
    givens = list(dict.fromkeys(row.given for row in drawn if row.map != "argmax"))
    panels = _by_data(_points(drawn))
    heights = [len(dict.fromkeys(row.method for row in members)) for members in panels.values()]
    series = max(Counter((row.data, row.method) for members in panels.values() for row in members).values())
    figure = figure_module.Figure(
        figsize=(9, 1.2 + sum(0.5 + n * (0.25 + 0.11 * series) for n in heights)), layout="constrained"
    )
    agg.FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(len(panels), 1, gridspec_kw={"height_ratios": heights}))
    for axis, (data, members) in zip(axes, panels.items()):
        methods = {row.method: row.title for row in members}
        for place, name in enumerate(methods):
            mine = [row for row in members if row.method == name]
            for row, offset in zip(mine, np.linspace(-0.36, 0.36, len(mine)) if len(mine) > 1 else [0.0]):
                spread = row.values[column]
                argmax = row.map == "argmax"
                axis.errorbar(
                    spread.mean,
                    place + offset,
                    xerr=spread.sd,
                    color=COLORS[noises.index(row.noise) % len(COLORS)],
                    marker="|" if argmax else MARKERS[givens.index(row.given) % len(MARKERS)],
                    markersize=9 if argmax else 5,
                    markeredgewidth=2 if argmax else 1,
                    capsize=2,
                    linestyle="none",
                )
        axis.set_yticks(range(len(methods)), [_wrapped(title) for title in methods.values()])
        axis.set_ylim(len(methods) - 0.5, -0.5)
        for edge in range(1, len(methods)):
            axis.axhline(edge - 0.5, color="0.85", linewidth=0.8)
        axis.set_title(data, loc="left", fontsize=11)
        axis.grid(axis="x", alpha=0.3)
    axes[-1].set_xlabel(f"{column}, mean and standard deviation over seeds")
    plain = {"linestyle": "none", "color": "0.35"}
    handles = [
        lines_module.Line2D([], [], linewidth=4, color=COLORS[i % len(COLORS)], label=f"trained with {name}")
        for i, name in enumerate(noises)
    ]
    handles.append(lines_module.Line2D([], [], marker="|", markersize=9, markeredgewidth=2, label="argmax", **plain))
    handles += [
        lines_module.Line2D([], [], marker=MARKERS[i % len(MARKERS)], label=f"refined, {_given(name)}", **plain)
        for i, name in enumerate(givens)
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return Path(path)


def _given(name: str) -> str:
    return "nothing given" if name == NONE else f"{name} given"


def _wrapped(title: str, width: int = 28) -> str:
    """A title in lines of about ``width`` characters."""
    lines = [""]
    for word in title.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
