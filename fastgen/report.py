"""Pictures and the written report of a run. Needs matplotlib (the extra `train`)."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.functional import nearest

BUSY = 0.1  # cores that other processes kept busy while a kernel was timed
ABOUT = (
    "kid: kernel distance to the test images, 0 for none. precision: share of samples within the data; recall and "
    "coverage: shares of the data within the samples, or reached by them; density: how many data a sample lies among, "
    "1 for real ones. two_sample: how often a sample is told from data, 0.5 for never but by chance. confident: share "
    "of samples of which the classifier is sure (> 0.9); rarest_class: the smallest share of a class."
)
FIGURES = ("kid", "precision", "recall", "density", "coverage", "two_sample", "confident", "rarest_class")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def grid(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """Images [N, C, H, W] as one picture [C, rows·(H + gap), columns·(W + gap)], white between them."""
    missing = -len(images) % columns
    images = torch.cat([images, images.new_ones(missing, *images.shape[1:])])
    images = torch.nn.functional.pad(images, (0, gap, 0, gap), value=1.0)
    rows = images.unflatten(0, (-1, columns))  # [rows, columns, C, H, W]
    return rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def picture(file: Path, panels: dict[str, Tensor], note: str | None = None) -> None:
    """Panels [C, H, W] side by side, a title over each; written beside and renamed."""
    plt = _pyplot()
    widest = max(panel.shape[2] / panel.shape[1] for panel in panels.values())
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * widest * len(panels), 4.9), squeeze=False, layout="constrained"
    )
    for axis, (title, panel) in zip(axes[0], panels.items(), strict=True):
        pixels = panel.clamp(0, 1).permute(1, 2, 0).numpy()
        axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=13)
        axis.axis("off")
    if note:
        figure.supxlabel(note, fontsize=11)
    # A point for each pixel at least, or the lines between images would be lost here and there; 4 inches are theirs.
    _save(figure, file, dpi=max(110, max(panel.shape[1] for panel in panels.values()) / 4))


def _save(figure: Any, file: Path, dpi: float = 110) -> None:
    part = file.with_name(file.stem + ".part" + file.suffix)
    figure.savefig(part, dpi=dpi, bbox_inches="tight")
    _pyplot().close(figure)
    os.replace(part, file)


def samples(file: Path, panels: dict[str, Tensor], side: int = 10) -> None:
    picture(file, {title: grid(images[: side * side], side) for title, images in panels.items()})


def reconstructions(file: Path, images: Tensor, decoded: Tensor, columns: int = 16) -> None:
    """Training images over their reconstructions, row by row."""
    pairs = torch.stack([images.unflatten(0, (-1, columns)), decoded.unflatten(0, (-1, columns))], 1).flatten(0, 2)
    picture(file, {"training images, and below each its reconstruction": grid(pairs, columns)})


def interpolations(file: Path, images: Tensor, steps: int) -> None:
    """Images [rows · steps, C, H, W]: a path between two codes in each row."""
    picture(file, {"from one code to another": grid(images, steps)})


def neighbours(file: Path, drawn: Tensor, train: Tensor, k: int = 5) -> None:
    """Each sample, then the k training images nearest to it in pixels: nothing was copied."""
    found = nearest(drawn.flatten(1), train.flatten(1), k)
    rows = torch.cat([drawn[:, None], train[found.index]], 1)  # [N, 1 + k, C, H, W]
    half = len(rows) // 2
    halves = torch.cat([rows[:half], torch.ones_like(rows[:half, :1]), rows[half : 2 * half]], 1)
    note = f"mean pixel distance to the nearest training image: {found.distance[:, 0].sqrt().mean():.2f}"
    picture(file, {f"a sample, then its {k} nearest training images": grid(halves.flatten(0, 1), 2 * k + 3)}, note)


def curves(file: Path, logs: Path) -> list[str]:
    """The losses of every stage under `logs` against the epoch; a resumed run's starts are joined. -> the stages"""
    plt = _pyplot()
    stages = sorted(folder for folder in logs.iterdir() if folder.is_dir()) if logs.is_dir() else []
    drawn = {stage.name: _curve(stage) for stage in stages}
    drawn = {name: curve for name, curve in drawn.items() if curve}
    if not drawn:
        return []
    figure, axes = plt.subplots(1, len(drawn), figsize=(5 * len(drawn), 3.4), squeeze=False, layout="constrained")
    for axis, (name, curve) in zip(axes[0], drawn.items(), strict=True):
        axis.plot(list(curve), list(curve.values()), marker="." if len(curve) < 20 else None)
        axis.set(title=name, xlabel="epoch", ylabel="loss")
        axis.xaxis.get_major_locator().set_params(integer=True)
        low, high = min(curve.values()), max(curve.values())
        if low > 0 and high > 2 * low:  # an unbiased MMD² may be negative
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(plt.LogLocator(subs=range(1, 10) if high < 10 * low else (1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")  # 6, not 6 × 10⁰
            axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.3, which="both")
    _save(figure, file)
    return list(drawn)


def _curve(stage: Path) -> dict[int, float]:
    """epoch -> loss; a later start's value stands where two have the same epoch."""
    found: dict[int, float] = {}
    versions = sorted(stage.glob("version_*/metrics.csv"), key=lambda f: int(f.parent.name.removeprefix("version_")))
    for file in versions:
        with open(file, newline="") as lines:
            found |= {int(row["epoch"]): float(row["loss"]) for row in csv.DictReader(lines) if row.get("loss")}
    return dict(sorted(found.items()))


def figures_table(metrics: dict[str, Any]) -> str:
    """kid … rarest_class of each source as a Markdown table, least to most of the sampling seeds in brackets."""
    lines = ["| | " + " | ".join(FIGURES) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for who, row in metrics.items():
        if isinstance(row, dict) and "spread" in row:
            cells = [f"{row[f]:.3g} ({row['spread'][f][0]:.3g} to {row['spread'][f][1]:.3g})" for f in FIGURES]
            lines.append(f"| {who} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured_table(metrics: dict[str, Any]) -> str:
    """The plain numbers of a model's own `measure`, a row each."""
    rows = [f"| {key} | {value:.4g} |" for key, value in metrics.items() if isinstance(value, (int, float))]
    return "\n".join(["| | |", "|---|---|", *rows])


def shares_table(seconds: dict[str, float]) -> str:
    """Seconds of each phase and its share of their sum."""
    total = sum(seconds.values())
    lines = ["| phase | seconds | share |", "|---|---|---|"]
    lines += [f"| {name} | {value:.1f} | {value / total:.0%} |" for name, value in seconds.items()]
    return "\n".join([*lines, f"| sum | {total:.1f} | |"])


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{seconds * 1e3:.3g} ms"


def costs_table(rows: list[dict[str, Any]]) -> str:
    """Rows of a benchmark file: fastgen against the plain torch code for the same work."""
    lines = ["| family | work | fastgen | eager | ratio |", "|---|---|---|---|---|"]
    seconds = {(r["family"], r["work"], r["provider"]): r["seconds"] for r in rows if "seconds" in r}
    for family, work in dict.fromkeys((r["family"], r["work"]) for r in rows):
        ours, eager = seconds.get((family, work, "fastgen")), seconds.get((family, work, "eager"))
        if ours and eager:
            lines.append(f"| {family} | {work} | {_time(ours)} | {_time(eager)} | {eager / ours:.1f}× |")
    loads = [r["other_load"] for r in rows if r.get("other_load", 0.0) > BUSY]
    if loads:
        lines += [
            "",
            f"**Other processes kept up to {max(loads):.1f} cores busy meanwhile: neither these times nor their",
        ]
        lines[-1] += " ratios are those of the kernels. `python -m benchmarks demo` measures again.**"
    return "\n".join(lines)


def write(folder: Path, metrics: dict[str, Any], record: dict[str, Any], extra: Sequence[str] = ()) -> None:
    """`report.md` of a run: the figures, the pictures (`extra`: the model's own), where the time went, what the kernels
    cost."""
    stages = curves(folder / "curves.png", folder / "logs")
    parts = [f"# {record['model'].upper()} on {record['data']}", ""]
    if "classifier_accuracy" in metrics:
        parts += [
            f"Features and classes are those of a small classifier (accuracy {metrics['classifier_accuracy']:.3f}).",
            f"{metrics['samples']} samples against as many test images; means of three sampling seeds and their range.",
            "",
            figures_table(metrics),
            "",
            ABOUT,
            "",
        ]
    else:
        parts += [measured_table(metrics), ""]
    for name in ("samples", "reconstructions", "interpolations", "neighbours", *extra):
        if (folder / f"{name}.png").exists():
            parts += [f"![{name}]({name}.png)", ""]
    if stages:
        parts += ["## Losses", "", "![losses](curves.png)", ""]
    peak = max(metrics["peak_rss"].values()) / 2**20
    parts += ["## Where the time went", "", shares_table(metrics["seconds"]), "", f"Peak memory: {peak:.0f} MiB.", ""]
    file = folder / "benchmark.json"
    if file.exists():
        benchmark = json.loads(file.read_text())
        m = benchmark["machine"]
        parts += ["## What the kernels cost", "", costs_table(benchmark["rows"]), ""]
        parts += [f"Measured on {m['device']}, {m['threads']} threads, torch {m['torch']}, {m['date']}."]
        parts += ["A kernel's ratio is not the program's: the table above says what share each phase has.", ""]
    part = folder / "report.md.part"
    part.write_text("\n".join(parts))
    os.replace(part, folder / "report.md")
