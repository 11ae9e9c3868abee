"""The report of a study: ``ablations.json`` with every figure, a plot, and tables between two marks of a page whose
other text is written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from robuq_core.files import replacing
from train.ablations.study import Contrast, Result, Row, Study
from train.allocate import LAYER_TYPES, PAPER_AVERAGES, averages_by_type

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
_LEVEL = 0.05
_PATHS = ("run_dir", "data.path", "data.vae", "data.class_names")  # of one machine


@dataclass(frozen=True)
class Interval:
    """Geometric mean of positive values with its 95% interval by Student's t; ``low``, ``high`` null of one value."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.3g}" if self.low is None else f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Comparison:
    """``ratio`` of the held-out MSE, paired by seed; ``p`` of the paired t-test on its logarithm, ``corrected`` by Holm
    over all contrasts. Null with fewer than two seeds, or where a training diverged."""

    contrast: Contrast
    ratio: Interval | None
    seeds: int
    p: float | None
    corrected: float | None = None

    @property
    def verdict(self) -> str:
        if self.ratio is None or self.corrected is None:
            return "-"
        if self.corrected > _LEVEL:
            return "not shown"
        return "better" if self.ratio.value < 1 else "worse"


def geometric(values: Sequence[float]) -> Interval:
    """Of at least one positive value."""
    logs = [math.log(value) for value in values]
    mean = math.fsum(logs) / len(logs)
    if len(logs) < 2:
        return Interval(math.exp(mean))
    half = float(stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs))
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(min(mean + half, 700.0)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: each p times the number of hypotheses not yet rejected, never falling."""
    corrected, most = [0.0] * len(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        most = max(most, min(1.0, (len(p) - place) * p[i]))
        corrected[i] = most
    return corrected


Key = tuple[str, float, float]  # row, bits, outlier factor


class Findings:
    """The results of ``study`` that are there, by row, bits and outlier factor, and then by seed."""

    def __init__(self, study: Study) -> None:
        self.study, self.rows = study, {row.name: row for row in study.config.rows}
        self.cells = list(study.cells())
        found: dict[Key, dict[int, Result]] = {}
        for cell in self.cells:
            if (result := study.result(cell)) is not None:
                found.setdefault((cell.row.name, cell.bits, cell.factor), {})[cell.seed] = result
        places = {name: place for place, name in enumerate(self.rows)}
        self.results = dict(sorted(found.items(), key=lambda item: (places[item[0][0]], item[0][2], -item[0][1])))

    def mse(self, row: str, bits: float, factor: float = 1) -> dict[int, float | None]:
        return {seed: each.teacher_mse for seed, each in self.results.get((row, bits, factor), {}).items()}

    def interval(self, row: str, bits: float, factor: float = 1) -> Interval | None:
        """None without results, or if a training diverged."""
        values = self.mse(row, bits, factor).values()
        kept = [value for value in values if value is not None]
        return geometric(kept) if kept and len(kept) == len(values) else None

    def compared(self) -> list[Comparison]:
        found = [self._compare(each) for each in self.study.config.contrasts]
        # A contrast without a p value still counts: leaving it out would favour the others.
        corrected = holm([1.0 if each.p is None else each.p for each in found])
        return [each if each.p is None else replace(each, corrected=value)
                for each, value in zip(found, corrected, strict=True)]  # fmt: skip

    def _compare(self, contrast: Contrast) -> Comparison:
        row, against = self.mse(contrast.row, contrast.bits), self.mse(contrast.against, contrast.bits)
        pairs = [(row[seed], against[seed]) for seed in sorted(row.keys() & against.keys())]
        ratios = [a / b for a, b in pairs if a is not None and b is not None]
        if not ratios or len(ratios) < len(pairs):
            return Comparison(contrast, None, len(pairs), None)
        p = None
        if len(ratios) > 1:
            p = float(stats.ttest_1samp([math.log(ratio) for ratio in ratios], 0.0).pvalue)
            p = 1.0 if math.isnan(p) else p  # equal trainings, as where a search finds one width for all
        return Comparison(contrast, geometric(ratios), len(ratios), p)

    def doses(self) -> tuple[list[Row], list[float]]:
        """The rows that were trained with outliers, and all their factors."""
        rows = [row for row in self.rows.values() if len(row.outliers) > 1
                and any(self.mse(row.name, row.bits[0], factor) for factor in row.outliers if factor != 1)]  # fmt: skip
        return rows, sorted({factor for row in rows for factor in row.outliers})

    def widths(self) -> list[tuple[str, float, dict[str, float]]]:
        """Of each searched row at each number of bits: mean width by layer type, over seeds."""
        found = []
        for (row, bits, factor), by_seed in self.results.items():
            means = [averages_by_type(each.bits) for each in by_seed.values() if each.bits is not None]
            if means and factor == 1:
                found.append((row, bits, {kind: sum(m[kind] for m in means) / len(means) for kind in LAYER_TYPES}))
        return found


def write_report(study: Study, folder: Path) -> Path:
    """Write ``ablations.md``, its plot and ``ablations.json`` to ``folder``; returns the page."""
    findings, page = Findings(study), folder / "ablations.md"
    text = page.read_text() if page.exists() else f"# Ablations\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        before, after = text.rstrip() + "\n\n", "\n"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    plot(findings, folder / "images" / "ablations.svg")
    for path, content in (
        (page, f"{before}{BEGIN}\n{markdown(findings)}{END}{after}"),
        (folder / "ablations.json", json.dumps(as_json(findings), indent=1) + "\n"),
    ):
        with replacing(path) as temporary:
            temporary.write_text(content)
    return page


def as_json(findings: Findings) -> dict[str, Any]:
    """Every result, the contrasts, and the study that they are of."""
    study = findings.study.config
    config = study.model_dump(mode="json")
    config["run"] = study.run.name
    config["set"] = {key: value for key, value in config["set"].items() if key not in _PATHS}
    return {
        "study": config,
        "results": [
            {"row": row, "bits": bits, "outliers": factor, "seed": seed, **asdict(each)}
            for (row, bits, factor), by_seed in findings.results.items()
            for seed, each in sorted(by_seed.items())
        ],
        "contrasts": [{**asdict(each), "contrast": each.contrast.model_dump(), "verdict": each.verdict}
                      for each in findings.compared()],
        "widths": [{"row": row, "bits": bits, **means} for row, bits, means in findings.widths()],
    }  # fmt: skip


def markdown(findings: Findings) -> str:
    parts = [_setup(findings), _contrasts(findings), _rows(findings), _outliers(findings), _widths(findings)]
    return "\n".join([*filter(None, parts), "![MSE to the teacher by row, bits and outliers](images/ablations.svg)\n"])


def _setup(findings: Findings) -> str:
    study = findings.study
    config = study.run_config(findings.cells[0])
    model, done = config.model, sum(map(len, findings.results.values()))
    fd = f" FD is FD-EffNet of {study.config.fd_samples:,} samples." if study.config.fd_samples else ""
    return (
        f"{done} of {len(findings.cells)} trainings are done. DiT of width {model.hidden_size}, depth {model.depth}, "
        f"{model.num_tokens} tokens of {model.patch_size}x{model.patch_size} pixels, {model.num_classes} classes; "
        f"teacher {config.teacher.steps:,} steps, then {config.qat.steps:,} steps of quantisation-aware training, "
        f"batch {config.qat.batch_size}. {len(study.config.seeds)} seeds, each with its own batches and rotation. "
        f"MSE: of the prediction to the teacher's, on {study.config.points:,} noised images of the "
        f"{config.evaluation.split} split.{fd}\n"
    )


def _contrasts(findings: Findings) -> str:
    rows = []
    for each in findings.compared():
        p, corrected = ("-" if value is None else f"{value:.2g}" for value in (each.p, each.corrected))
        contrast = f"{each.contrast.name}: “{each.contrast.row}” / “{each.contrast.against}”"
        rows.append((contrast, f"A{each.contrast.bits:g}", each.ratio or "-", each.seeds, p, corrected, each.verdict))
    about = ("Ratio of the MSE, paired by seed, with its 95% interval; p of the paired t-test, corrected by Holm over "
             "all contrasts. Below 1 is better.")  # fmt: skip
    return _table("Contrasts", about, ("contrast", "bits", "ratio", "seeds", "p", "p, Holm", "verdict"), rows)


def _rows(findings: Findings) -> str:
    fd, rows = bool(findings.study.config.fd_samples), []
    for (name, bits, factor), by_seed in findings.results.items():
        if factor != 1:
            continue
        results, found = by_seed.values(), findings.interval(name, bits)
        excess = _mean([each.loss - each.teacher_loss for each in results if each.loss is not None], ".4f")
        width = "full" if findings.rows[name].full_precision else f"A{bits:g}"
        distance = [_mean([each.fd for each in results if each.fd is not None], ".1f")] * fd
        rows.append((name, width, found or "diverged", excess, len(results), *distance))
    return _table("All rows", "", ("row", "bits", "MSE to the teacher", "excess loss", "seeds", *["FD"] * fd), rows)


def _mean(values: Sequence[float], shown: str) -> str:
    return format(sum(values) / len(values), shown) if values else "-"


def _outliers(findings: Findings) -> str:
    doses, factors = findings.doses()
    rows = []
    for row in doses:
        found = [findings.interval(row.name, row.bits[0], factor) or "-" for factor in factors]
        seeds = min(len(findings.mse(row.name, row.bits[0], factor)) for factor in factors)
        rows.append((f"{row.name}, A{row.bits[0]:g}", *found, seeds))
    channels = findings.study.config.outlier_channels
    about = (f"MSE to the teacher where {channels} input channels of each qkv, proj and fc1 are larger by a factor and "
             "their weights smaller: in full precision the same function.")  # fmt: skip
    return _table("Outliers", about, ("row", *(f"x{factor:g}" for factor in factors), "seeds"), rows)


def _widths(findings: Findings) -> str:
    found = findings.widths()
    paper = [("the paper, DiT-XL/2", bits, means) for bits, means in PAPER_AVERAGES.items()] if found else []
    rows = [(row, f"A{bits:g}", *(f"{means[kind]:.2f}" for kind in LAYER_TYPES)) for row, bits, means in found + paper]
    return _table("Widths that the search gives each layer type", "", ("row", "average", *LAYER_TYPES), rows)


def _table(title: str, about: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Empty without rows."""
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in (header, ["---"] * len(header), *rows)]
    head = [f"### {title}", "", *([about, ""] if about else [])]
    return "\n".join([*head, *lines]) + "\n" if len(lines) > 2 else ""


def plot(findings: Findings, path: Path) -> None:
    """MSE by row at 2 bits, by average bits, and by outlier factor; every seed is a dot; SVG."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    bars, curve, dose = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    shown = [name for name in reversed(findings.rows) if findings.mse(name, 2)]
    for i, name in enumerate(shown):
        _points(bars, [(i, findings.mse(name, 2))], "C0", vertical=False)
    bars.set_yticks(range(len(shown)), shown)
    bars.set(xlabel="MSE to the teacher", xscale="log", title="Rows at 2 bits")
    for row in findings.rows.values():
        points = [(bits, findings.mse(row.name, bits)) for bits in sorted(row.bits)]
        if sum(bool(values) for _, values in points) > 2:
            _points(curve, points, f"C{len(curve.lines) % 10}", label=row.name)
    curve.set(xlabel="average bits", yscale="log", title="Average bits")
    for i, row in enumerate(findings.doses()[0]):
        points = [(factor, findings.mse(row.name, row.bits[0], factor)) for factor in sorted(row.outliers)]
        _points(dose, points, f"C{i}", label=row.name)
    dose.set(xlabel="outliers larger by", xscale="log", yscale="log", title="Outliers, same function")
    for axes in (curve, dose):
        axes.grid(alpha=0.3, which="both")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    # No date and fixed ids, so that the same results give the same drawing.
    with replacing(path) as temporary, mpl.rc_context({"svg.hashsalt": "robuq"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def _points(
    axes: Axes,
    points: Sequence[tuple[float, dict[int, float | None]]],
    colour: str,
    *,
    vertical: bool = True,
    label: str | None = None,
) -> None:
    """A line through the geometric means, a dot for each seed."""
    dots = [(x, value) for x, values in points for value in values.values() if value is not None]
    means = [(x, geometric([value for at, value in dots if at == x]).value) for x in dict(dots)]
    for line, style, alpha, name in ((means, "o-", 1.0, label), (dots, ".", 0.4, None)):
        xs, ys = [x for x, _ in line], [y for _, y in line]
        axes.plot(*((xs, ys) if vertical else (ys, xs)), style, color=colour, alpha=alpha, label=name)
