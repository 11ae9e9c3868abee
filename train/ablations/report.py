"""The tables of a study as Markdown, between two marks of a page whose other text is written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robuq_core.files import replacing
from train.ablations.findings import (
    AIMS,
    METRIC,
    Cell,
    Direction,
    as_json,
    cells,
    directions,
    distances,
    searched_widths,
)
from train.ablations.intervals import Interval, mean_interval
from train.ablations.pictures import plot_ladder, plot_samples
from train.ablations.runs import floor_distance, network_digest, write_json
from train.ablations.study import Study
from train.allocate import LAYER_TYPES, PAPER_AVERAGES, averages_by_type

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def write_report(study: Study, folder: Path) -> Path:
    """Write ``ablations.md``, its pictures and ``ablations.json`` to ``folder``; returns the page."""
    page = folder / "ablations.md"
    text = page.read_text() if page.exists() else f"# Ablations\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        before, after = text.rstrip() + "\n\n", "\n"
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    plot_ladder(study, images / "ablations.svg")
    plot_samples(study, images / "ablations-samples.png")
    with replacing(page) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{markdown(study)}{END}{after}")
    write_json(folder / "ablations.json", as_json(study))
    return page


def markdown(study: Study) -> str:
    parts = [_setup(study), _distance_table(study), _direction_table(study), _extras_table(study)]
    parts += [_allocation_table(study), _pictures()]
    return "\n".join(part for part in parts if part)


def _setup(study: Study) -> str:
    config = study.config
    _, _, accuracy = study.place.network(network_digest(study.full_precision(0)))
    model = config.model
    return (
        f"DiT of width {model.hidden_size}, depth {model.depth}, {model.num_tokens} tokens of {model.patch_size}x"
        f"{model.patch_size} pixels; teacher {config.teacher.steps:,} steps, then {config.qat.steps:,} steps of "
        f"quantisation-aware training, batch {config.qat.batch_size}; {len(config.seeds)} seeds; {config.samples:,} "
        f"samples of {config.sampler.steps} {config.sampler.sampler} steps, no guidance. {METRIC}: the Fréchet "
        f"distance from the training images on features of a small convolutional classifier of the same data, which "
        f"gets {accuracy:.1%} of the test images right. Lower is better; it is no FID.\n"
    )


def _distance_table(study: Study) -> str:
    config = study.config
    found = {(cell.row, cell.width): cell for cell in cells(study, config.ladder)}
    lines = [f"### {METRIC}, mean over seeds with its 95% interval, and ratio to full precision", ""]
    lines += [_header("", *(f"A{width}" for width in config.widths), *(f"A{w} / full" for w in config.widths))]
    for row in config.ladder:
        entries = [found.get((row.name, width)) for width in config.widths]
        lines.append(_line(row.name, *(_distance(cell) for cell in entries), *(_ratio_text(cell) for cell in entries)))
    aims = (f"aim <= {AIMS[width]}" if width in AIMS else "" for width in config.widths)
    lines.append(_line("aim", *("" for _ in config.widths), *aims))
    full = [each for each in distances(study.results(None, 0)) if each is not None]
    if full:
        lines += ["", f"Full precision, trained for the same steps: {_mean(full)}. As many unseen real images: "
                      f"{floor_distance(study.place, study.full_precision(0)):.2f}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _direction_table(study: Study) -> str:
    ladder = {row.name for row in study.config.ladder}
    lines = ["### Each step against the row above it", "",
             "Ratio of distances, paired by seed, with its 95% interval. The paper finds every step better.", "",
             _header("step", *(f"A{width}" for width in study.config.widths))]  # fmt: skip
    table = {(each.row, each.width): each for each in directions(study) if each.row in ladder}
    for row in study.config.ladder[1:]:
        entries = (table.get((row.name, width)) for width in study.config.widths)
        lines.append(_line(row.name, *(_direction(each) for each in entries)))
    return "\n".join(lines) + "\n"


def _extras_table(study: Study) -> str:
    extras = list(cells(study, study.config.extras))
    if not extras:
        return ""
    against = {(each.row, each.width): each for each in directions(study)}
    lines = [f"### Beside the ladder, against “{study.config.ladder[-1].name}”", "",
             _header("", "width", METRIC, "/ full precision", "/ the whole method")]  # fmt: skip
    for cell in extras:
        lines.append(_line(cell.row, f"A{cell.width}", _distance(cell), _ratio_text(cell),
                           _direction(against.get((cell.row, cell.width)))))  # fmt: skip
    return "\n".join(lines) + "\n"


def _allocation_table(study: Study) -> str:
    lines = ["### Widths that the search gives each layer type", "",
             _header("row", "budget", "method", *LAYER_TYPES, "average", "predicted rise of the MSE")]  # fmt: skip
    budgets = set()
    for row, width, found in searched_widths(study):
        budgets.add(width)
        for method, each in found.allocations.items():
            means = averages_by_type(each.bits)
            by_type = (f"{means[kind]:.2f}" for kind in LAYER_TYPES)
            lines.append(_line(row.name, f"A{width}", method.replace("_", " "), *by_type,
                               f"{each.average_bits:.3f}", f"{each.predicted_loss:+.2e}"))  # fmt: skip
    for budget in sorted(budgets & set(PAPER_AVERAGES), reverse=True):
        means = PAPER_AVERAGES[budget]
        lines.append(_line("the paper, DiT-XL/2", f"A{budget}", "", *(f"{means[k]:.2f}" for k in LAYER_TYPES), "", ""))
    return "\n".join(lines) + "\n" if budgets else ""


def _pictures() -> str:
    return "![Distance by row and width](images/ablations.svg)\n\n![Samples by row](images/ablations-samples.png)\n"


def _header(*names: str) -> str:
    return _line(*names) + "\n" + _line(*("---" for _ in names))


def _line(*entries: str) -> str:
    return "| " + " | ".join(entries) + " |"


def _distance(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    kept = [each for each in cell.distances if each is not None]
    diverged = len(cell.distances) - len(kept)
    return f"{diverged} of {len(cell.distances)} diverged" if diverged else _mean(kept)


def _mean(values: Sequence[float]) -> str:
    found = mean_interval(values)
    return f"{found.value:.2f} ± {found.high - found.value:.2f}" if len(values) > 1 else f"{found.value:.2f}"


def _ratio_text(cell: Cell | None) -> str:
    return "-" if cell is None or cell.ratio is None else _interval(cell.ratio)


def _interval(found: Interval) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]" if found.low > 0 else f"{found.value:.2f}"


def _direction(each: Direction | None) -> str:
    if each is None:
        return "-"
    return each.verdict if each.ratio is None else f"{_interval(each.ratio)} {each.verdict}"
