"""The report's pictures: speed-up bars, time and memory against N, a roofline. Needs matplotlib (the extra `bench`)."""

import math
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.harness import Row, seconds_text

OURS = "#d1495b"
COLOURS = {
    "eager": "#8d99ae",
    "torch.compile": "#2e86ab",
    "torch.compile, CUDA graph": "#5fa8d3",
    "keops": "#f2a541",
    "geomloss, online": "#8cb369",
    "geomloss, tensorized": "#588157",
    "faiss": "#6a4c93",
    "flash-kmeans": "#3d5a80",
    "lpips": "#a47148",
    "add": "#000000",
    "eager, as JEM": "#6d597a",
    "eager, as UvA": "#b56576",
    "torchebm": "#2a9d8f",
    "torchebm, fused step": "#94d2bd",
    "torch.cdist": "#0f4c5c",
    "faiss, rows copied": "#9a031e",
}
OTHERS = ("#5f0f40", "#bc6c25", "#386641", "#7f5539")
MARKS = {"mmd": "o", "langevin": "s", "perceptual": "^", "nearest": "D"}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def colour(provider: str) -> str:
    if results.ours(provider):
        return OURS
    return COLOURS.get(provider) or OTHERS[sum(map(ord, provider)) % len(OTHERS)]


def _save(figure: Any, file: Path) -> None:
    part = file.with_name(file.stem + ".part.png")
    figure.savefig(part, dpi=110, bbox_inches="tight", metadata={"Software": None})
    _pyplot().close(figure)
    part.replace(file)


def draw(content: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """(title, file) of every picture that these rows give."""
    rows = content["rows"]
    drawn = []
    if speedups(rows, folder / "speedup.png"):
        drawn.append(("How many times faster fastgen is than each peer", "speedup.png"))
    for cost, title in (("seconds", "Time"), ("peak_bytes", "Memory")):
        name = "time.png" if cost == "seconds" else "memory.png"
        if curves(rows, cost, folder / name):
            drawn.append((f"{title} against N", name))
    if roofline(content, folder / "roofline.png"):
        drawn.append(("Roofline: what each provider reaches of what the machine can do", "roofline.png"))
    return drawn


def speedups(rows: list[Row], file: Path) -> bool:
    """A bar for each peer and work: its time over ours. Beyond the line at 1 fastgen is faster."""
    bars = []
    for (family, work), group in results.grouped(rows).items():
        own = next((r["seconds"] for r in group if r["provider"] == "fastgen" and "seconds" in r), None)
        peers = [r for r in group if "seconds" in r and not results.ours(r["provider"]) and r["provider"] != "add"]
        if own and peers:
            bars.append((family, work, own, sorted(peers, key=lambda r: r["seconds"])))
    if not bars:
        return False
    plt = _pyplot()
    height = sum(len(peers) + 1.3 for *_, peers in bars)
    figure, axis = plt.subplots(figsize=(10, 0.17 * height + 1.4), layout="constrained")
    y, ticks, labels = 0.0, [], []
    seen: dict[str, Any] = {}
    for family, work, own, peers in bars:
        ticks.append(y + (len(peers) - 1) / 2)
        labels.append(f"{family}: {work}\nfastgen {seconds_text(own)}")
        for row in peers:
            ratio = row["seconds"] / own
            bar = axis.barh(y, ratio - 1, left=1, height=0.9, color=colour(row["provider"]))
            axis.text(max(ratio, 1) * 1.03, y, f"{ratio:.1f}×", va="center", fontsize=6.5)
            seen.setdefault(row["provider"], bar)
            y += 1
        y += 1.3
    axis.axvline(1, color=OURS, linewidth=2)
    axis.text(1, -1.1, "fastgen", color=OURS, ha="center", va="bottom", fontsize=9, fontweight="bold")
    axis.set_xscale("log")
    axis.set_yticks(ticks, labels, fontsize=7)
    axis.set_ylim(y, -1.2)
    axis.set_xlabel("time of the peer / time of fastgen; longer bars to the right: fastgen is that many times faster")
    axis.grid(axis="x", alpha=0.3, which="both")
    axis.legend(seen.values(), seen.keys(), fontsize=8, loc="lower right")
    _save(figure, file)
    return True


def _series(rows: list[Row], cost: str) -> dict[tuple[str, str, int], dict[str, list[tuple[int, float]]]]:
    """(family, series, D) -> provider -> points, where at least two sizes were measured."""
    found: dict[tuple[str, str, int], dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        size = row["size"]
        if row["status"] == "ok" and row.get(cost) and "N" in size and size.get("M", size["N"]) == size["N"]:
            key = row["family"], row["series"], size.get("D", 0)
            found.setdefault(key, {}).setdefault(row["provider"], []).append((size["N"], row[cost]))
    return {
        key: {p: sorted(points) for p, points in lines.items()}
        for key, lines in found.items()
        if len({n for points in lines.values() for n, _ in points}) > 1
    }


def _count_text(n: int) -> str:
    for unit, scale in (("M", 10**6), ("k", 10**3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return str(n)


def curves(rows: list[Row], cost: str, file: Path) -> bool:
    """A panel for each series, a line for each provider, both axes logarithmic."""
    panels = _series(rows, cost)
    if not panels:
        return False
    plt = _pyplot()
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.3 * columns, 3.3 * lines), squeeze=False, layout="constrained"
    )
    seen: dict[str, Any] = {}
    for axis, ((family, series, d), providers) in zip(axes.flat, panels.items(), strict=False):
        for provider, points in providers.items():
            own = results.ours(provider)
            (line,) = axis.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=6 if own else 4,
                linewidth=2.6 if own else 1.4,
                linestyle="--" if own and provider != "fastgen" else "-",
                color=colour(provider),
                zorder=3 if own else 2,
            )
            seen.setdefault(provider, line)
        axis.set_xscale("log")
        axis.set_yscale("log", base=10 if cost == "seconds" else 2)
        axis.set_title(f"{family}: {series}" + (f", D = {d}" if d else ""), fontsize=9)
        axis.set_xlabel({"langevin": "elements", "perceptual": "pixels"}.get(family, "N = M points"), fontsize=8)
        axis.grid(alpha=0.3, which="both")
        measured = sorted({n for points in providers.values() for n, _ in points})
        axis.set_xticks(measured, [_count_text(n) for n in measured], fontsize=8)
        axis.xaxis.set_minor_formatter(lambda v, _: "")
        said = seconds_text if cost == "seconds" else results.bytes_text
        axis.yaxis.set_major_formatter(lambda v, _, said=said: said(v))
        low, high = axis.get_ylim()
        if cost == "seconds" and high < 30 * low:  # few decades have few names
            axis.yaxis.set_minor_formatter(lambda v, _, said=said: said(v) if f"{v:e}"[0] in "25" else "")
        else:
            axis.yaxis.set_minor_formatter(lambda v, _: "")
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.suptitle(
        {
            "seconds": "Time of one call: lower is faster",
            "peak_bytes": "Memory of one call beyond its inputs: lower is less",
        }[cost]
    )
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=4, fontsize=8)
    _save(figure, file)
    return True


def roofline(content: dict[str, Any], file: Path) -> bool:
    """Operations a second over operations a byte, both of the least that the work asks for, under the measured roof."""
    limits = content["machine"].get("limits", {})
    points = [r for r in content["rows"] if "seconds" in r and r["operations"] and r["moved"]]
    kind, flat = max(((k, v) for k, v in limits.items() if k != "copy"), key=lambda kv: kv[1], default=("", 0.0))
    if not points or not flat or "copy" not in limits:
        return False
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    least, most = (f(r["operations"] / r["moved"] for r in points) for f in (min, max))
    edges = [min(least / 3, flat / limits["copy"] / 3), flat / limits["copy"], max(most * 3, flat / limits["copy"] * 3)]
    axis.plot(edges, [edges[0] * limits["copy"], flat, flat], color="black", linewidth=2)
    # Left of the marks, above the roof.
    axis.text(edges[1], flat * 1.15, f"{kind} matrix product, {flat / 1e9:.0f} GFLOP/s", ha="right", fontsize=8)
    axis.text(edges[0], edges[0] * limits["copy"] * 8, f"copy, {limits['copy'] / 1e9:.0f} GB/s", fontsize=8)
    seen: dict[str, Any] = {}
    for row in points:
        own = results.ours(row["provider"])
        mark = axis.scatter(
            row["operations"] / row["moved"],
            row["operations"] / row["seconds"],
            marker=MARKS[row["family"]],
            s=70 if own else 36,
            color=colour(row["provider"]),
            edgecolor="black" if own else "none",
            linewidth=0.6,
            zorder=3 if own else 2,
        )
        seen.setdefault(row["provider"], mark)
    for family in dict.fromkeys(r["family"] for r in points):
        seen[f"shape: {family}"] = axis.scatter([], [], marker=MARKS[family], color="white", edgecolor="black")
    axis.set(xscale="log", yscale="log", xlabel="operations the work asks for, a byte that it has to move")
    axis.set_ylabel("operations a second")
    axis.set_title(
        "Each mark is one work by one provider: the nearer to the roof, the less time is wasted.\n"
        "Above it: what stays in the caches, products of small integers, fewer products than the plain sums have",
        fontsize=9,
    )
    axis.grid(alpha=0.3, which="both")
    figure.legend(seen.values(), seen.keys(), loc="outside right upper", fontsize=8)
    _save(figure, file)
    return True
