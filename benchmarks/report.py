"""From result files to what a person reads: report.md with pictures, regressions, and the README's tables.

The same files give the same bytes. A measurement slower than the stored one by more than both runs' own noise, and by
more than its peers in the same work, is a regression: it is named, and the exit status is 1.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import bars, growth, machine, nearest_ring, results
from benchmarks.harness import Row, seconds_text

FAMILIES = {
    "mmd": "MMD: kernel sums over all pairs of two samples, with gradients",
    "langevin": "Langevin: noisy gradient steps",
    "perceptual": "Perceptual: LPIPS and feature losses, with gradients",
    "nearest": "Nearest: exact nearest neighbours",
}
LEAST_REGRESSION = 1.05
# The README's rows: (what it says, family, work), of the work's providers those in the columns.
README_ROWS = [
    (
        "MMD, WAE's 7 IMQ scales, value and both gradients, 4096 x 4096 x 64",
        "mmd",
        "IMQ-7, 4096 x 4096 x 64, both gradients",
    ),
    ("MMD likewise, 4096 x 4096 x 8", "mmd", "IMQ-7, 4096 x 4096 x 8, both gradients"),
    ("MMD likewise, one gradient, 128 x 128 x 8", "mmd", "IMQ-7, 128 x 128 x 8, one gradient"),
    (
        "Langevin step with noise, prior and clamp, 12.6 M elements",
        "langevin",
        "step, noise and prior, fp32, 1024x3x64x64",
    ),
    ("LPIPS distance from VGG features, 4 x 128 x 128", "perceptual", "LPIPS from VGG features, 4x128x128, contiguous"),
    ("LPIPS-VGG whole, 2 x 64 x 64, target cached", "perceptual", "LPIPS-vgg, 2x3x64x64, gradient to one image"),
    ("exact nearest, 10,000 x 10,000 x 64", "nearest", "top-1 of 10000 x 10000 x 64"),
    ("exact nearest, 10,000 x 10,000 x 784", "nearest", "top-1 of 10000 x 10000 x 784"),
    ("exact nearest of a million streamed rows, 1000 x 64", "nearest", "top-1 of 1000 x 1000000 x 64, streamed"),
    ("exact nearest in a ring of processes, one thread each", "nearest", "top-1 of 8000 x 80000 x 64, a thread each"),
]
README_GPU_ROWS = [
    (
        "MMD, WAE's 7 IMQ scales, value and both gradients, 16384 x 16384 x 64",
        "mmd",
        "IMQ-7, 16384 x 16384 x 64, both gradients",
    ),
    *[row for row in README_ROWS if row[1] != "perceptual"],
    ("LPIPS-VGG whole, 2 x 256 x 256, target cached", "perceptual", "LPIPS-vgg, 2x3x256x256, gradient to one image"),
    ("exact nearest, 1 M x 1 M x 128", "nearest", "top-1 of 1000000 x 1000000 x 128"),
    ("exact nearest, 1 M x 1 M x 800", "nearest", "top-1 of 1000000 x 1000000 x 800"),
]
NOT_MEASURED = "GPU speed is not measured yet."


def noise(row: Row) -> float:
    """How far a run's own rounds lie apart: the 80 % quantile over the least."""
    return float(row["quantiles"][2]) / float(row["seconds"])


def regressions(new: list[Row], old: list[Row]) -> list[str]:
    """A sentence for each of our rows that became slower, wrong or gone between two result files of one device. What
    the peers of the same work lost from one to the other is the machine's and not ours: a day on which it is slower as
    a whole is no regression."""
    stored = {(r["family"], r["work"], r["provider"]): r for r in old}
    drift: dict[tuple[str, str], float] = {}
    for row in new:
        before = stored.get((row["family"], row["work"], row["provider"]))
        if before and "seconds" in before and "seconds" in row and not results.ours(row["provider"]):
            work = row["family"], row["work"]
            drift[work] = max(drift.get(work, 1.0), row["seconds"] / before["seconds"])
    found = []
    for row in new:
        before = stored.get((row["family"], row["work"], row["provider"]))
        if before is None or "seconds" not in before or not results.ours(row["provider"]):
            continue
        name = f"{row['family']}: {row['work']}, {row['provider']}"
        if "seconds" not in row:
            found.append(f"{name}: was {seconds_text(before['seconds'])}, is {row['status']}")
            continue
        allowed = max(LEAST_REGRESSION, noise(row), noise(before))
        ratio, machine_lost = row["seconds"] / before["seconds"], drift.get((row["family"], row["work"]), 1.0)
        if ratio > allowed * machine_lost:
            times = f"{seconds_text(before['seconds'])} to {seconds_text(row['seconds'])}"
            peers = f", its peers became up to {machine_lost:.2f} times slower" if machine_lost > 1 else ""
            found.append(f"{name}: {times}, {ratio:.2f} times; the runs' noise is {allowed:.2f}{peers}")
    return found


def machine_text(content: dict[str, Any]) -> str:
    m = content["machine"]
    where = (
        f"{m['threads']} thread{'s' * (m['threads'] > 1)} of {m['device']} ({m['kernels']})"
        if m["type"] == "cpu"
        else m["device"]
    )
    versions = ", ".join(f"{k} {v}" for k, v in sorted(m["versions"].items()))
    limits = m.get("limits", {})
    best = [f"a copy {limits['copy'] / 1e9:.0f} GB/s"] if "copy" in limits else []
    best += [f"{kind} products {v / 1e9:.0f} GFLOP/s" for kind, v in limits.items() if kind != "copy"]
    return (
        f"{where}, torch {m['torch']}, Python {m['python']}, {versions}; commit {m['commit']}, {m['date']}. "
        f"At its best in this run: {', '.join(best)}."
    )


def headline(rows: list[Row]) -> list[str]:
    """One line for each work: how many times faster than the best peer, and than eager."""
    lines = ["| work | fastgen | best peer | times faster | than eager |", "|---|---|---|---|---|"]
    for (family, work), group in results.grouped(rows).items():
        own = next((r for r in group if r["provider"] == "fastgen"), None)
        if own is None:
            continue
        peer = results.best_peer(group)
        eager = next((r for r in group if r["provider"] == "eager" and "seconds" in r), None)
        cells = [f"{family}: {work}", results.time_text(own) if "seconds" in own else f"**{own['status']}**"]
        cells.append(f"{peer['provider']} {results.time_text(peer)}" if peer else "")
        for other in (peer, eager):
            cells.append(f"{other['seconds'] / own['seconds']:.1f}×" if other and "seconds" in own else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(content: dict[str, Any], drawn: list[tuple[str, str]], found: list[str]) -> str:
    rows = content["rows"]
    parts = ["# fastgen beside its peers", "", machine_text(content), ""]
    if warned := results.warning(rows):
        parts += [f"**{warned}**", ""]
    parts += [
        "Times are minima of interleaved rounds. Every result was checked against float64 before it was timed: a wrong "
        "one has no time. Memory is what one call takes beyond its inputs.",
        "",
    ]
    if found:
        parts += ["## Regressions", "", *(f"- {sentence}" for sentence in found), ""]
    if asked := bars.text(content):
        parts += ["## Bars", "", asked, ""]
    parts += ["## At a glance", "", *headline(rows), ""]
    parts += [line for title, file in drawn for line in (f"![{title}]({file})", "")]
    for family, title in FAMILIES.items():
        own = [row for row in rows if row["family"] == family]
        if own:
            parts += [f"## {title}", "", results.table(own), ""]
    if grown := growth.text(rows):
        parts += ["## Growth", "", "Exponents fitted to the largest sizes of each series.", "", grown, ""]
    if scaled := nearest_ring.text(rows):
        parts += ["## Processes that share a search", "", scaled, ""]
    if paper := nearest_ring.on_paper(content):
        parts += ["## A billion points, on paper", "", paper, ""]
    if content.get("largest"):
        parts += ["## The largest N that fits", "", growth.largest_text(content["largest"]), ""]
    if spent := content.get("spent"):
        took = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in spent.items())
        parts += [f"Measuring took {sum(spent.values()) / 60:.1f} minutes: {took}.", ""]
    return "\n".join(parts)


def readme_table(content: dict[str, Any] | None, wanted: list[tuple[str, str, str]]) -> str:
    """A result file as the README shows it: ours, eager, torch.compile, and the best of the others by name."""
    if content is None:
        return NOT_MEASURED
    groups = results.grouped(content["rows"])
    lines = ["| work | fastgen | eager | torch.compile | other peers |", "|---|---|---|---|---|"]
    for says, family, work in wanted:
        group = groups.get((family, work), [])
        timed = {r["provider"]: r for r in group if "seconds" in r}
        if "fastgen" not in timed:
            continue
        others = [r for p, r in timed.items() if not results.ours(p) and p not in ("eager", "torch.compile")]
        others.sort(key=lambda r: r["seconds"])
        own = timed["fastgen"]
        memory = f", {results.bytes_text(own['peak_bytes'])}" if own.get("peak_bytes") is not None else ""
        cells = [says.replace(" x ", " × "), f"**{seconds_text(own['seconds'])}**{memory}"]
        shared = [(p.split(", ")[1], r) for p, r in timed.items() if p.startswith("fastgen, ") and "processes" in p]
        cells[-1] += "".join(f"; {name} {seconds_text(r['seconds'])}" for name, r in shared)
        cells += [_cell(group, timed, name) for name in ("eager", "torch.compile")]
        cells.append(", ".join(f"{r['provider']} {seconds_text(r['seconds'])}" for r in others[:3]))
        lines.append("| " + " | ".join(cells) + " |")
    warned = results.warning(content["rows"])
    return "\n".join([*lines, "", *_wrapped(machine_text(content)), *(["", *_wrapped(warned)] if warned else [])])


def _cell(group: list[Row], timed: dict[str, Row], name: str) -> str:
    if name in timed:
        return seconds_text(timed[name]["seconds"])
    row = next((r for r in group if r["provider"] == name), None)
    if row and "expected_seconds" in row:
        return f"about {seconds_text(row['expected_seconds'])}, skipped"
    return row["status"] if row else ""


def _wrapped(text: str, width: int = 118) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]


MARKED = re.compile(r"(<!-- benchmarks: (cpu|gpu) -->\n)(.*?)(<!-- /benchmarks -->)", re.S)


def readme(text: str, folder: Path) -> str:
    """The README with its marked tables made anew from the committed files: cpu.json, and whatever has a GPU's name."""

    def made(match: re.Match[str]) -> str:
        return match[1] + readme_block(match[2], folder) + "\n" + match[4]

    return MARKED.sub(made, text)


def readme_block(kind: str, folder: Path) -> str:
    if kind == "cpu":
        return readme_table(results.load(folder / "cpu.json"), README_ROWS)
    files = [results.load(f) for f in sorted(folder.glob("*.json"))]
    measured = [content for content in files if content["machine"]["type"] == "cuda"]
    return "\n\n".join(readme_table(content, README_GPU_ROWS) for content in measured) or NOT_MEASURED


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="*", metavar="RESULTS", help="files that --out wrote")
    parser.add_argument("--out", metavar="DIR", help="where report.md goes; beside the first file by default")
    parser.add_argument(
        "--against", metavar="FILE.json", help="a stored result; by default the committed one of this device"
    )
    parser.add_argument("--readme", action="store_true", help="write the README's tables from benchmarks/results")
    arguments = parser.parse_args(argv)
    if arguments.readme:
        file = machine.ROOT / "README.md"
        file.write_text(readme(file.read_text(), machine.ROOT / "benchmarks" / "results"))
        print(f"{file}: tables written")
    elif not arguments.results:
        raise ValueError("RESULTS: expected at least one file, got none")
    found = []
    for name in arguments.results:
        content = results.load(name)
        folder = Path(arguments.out) if arguments.out else Path(name).parent
        if len(arguments.results) > 1:
            folder = folder / Path(name).stem
        against = _stored(content, Path(name), arguments.against)
        slower = regressions(content["rows"], against["rows"]) if against else []
        write(content, folder, slower)
        print(f"{folder / 'report.md'}: written")
        found += slower
    for sentence in found:
        print(f"slower: {sentence}", file=sys.stderr)
    return 1 if found else 0


def _stored(content: dict[str, Any], file: Path, against: str | None) -> dict[str, Any] | None:
    if against:
        return results.load(against)
    for stored in sorted((machine.ROOT / "benchmarks" / "results").glob("*.json")):
        if stored.resolve() != file.resolve():
            other = results.load(stored)
            same = ("device", "type", "threads")
            if all(other["machine"].get(k) == content["machine"].get(k) for k in same):
                return other
    return None


def write(content: dict[str, Any], folder: Path, found: list[str]) -> None:
    from benchmarks import pictures

    folder.mkdir(parents=True, exist_ok=True)
    drawn = pictures.draw(content, folder)
    part = folder / "report.md.part"
    part.write_text(markdown(content, drawn, found))
    part.replace(folder / "report.md")
