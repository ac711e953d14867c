"""How many times faster than whom fastgen is to be, and whether a run's rows show it."""

from dataclasses import dataclass
from typing import Any

from benchmarks import results
from benchmarks.harness import Row, Work

BEST, COPY, FLOOR = "the best peer", "a copy", "1 ms, the floor"
SHARES = (COPY, FLOOR)
CPU, GPU = "two cores with AVX-512", "an H100"


@dataclass(frozen=True)
class Bar:
    """against: a provider, or BEST, the fastest of the peers; of SHARES, the machine's best, a share is asked
    asked: the least of its time over ours; most: the greatest of ours over its time, where that is asked instead
    own: which of ours"""

    family: str
    work: str
    against: str
    asked: float = 0.0
    most: float = 0.0
    own: str = "fastgen"
    on: str = CPU

    def measured(self, rows: list[Row]) -> float | None:
        """None where a time is missing."""
        group = results.grouped(rows).get((self.family, self.work), [])
        timed = {row["provider"]: row for row in group if "seconds" in row}
        own = timed.get(self.own)
        if own is None:
            return None
        if self.against == COPY:
            share = own.get("share_of_copy")
            return None if share is None else float(share)
        if self.against == FLOOR:
            return 1e-3 / float(own["seconds"])
        peer = results.best_peer(group) if self.against == BEST else timed.get(self.against)
        if peer is None:
            return None
        slower, faster = (own, peer) if self.most else (peer, own)
        return float(slower["seconds"]) / float(faster["seconds"])

    def met(self, ratio: float) -> bool:
        return ratio <= self.most if self.most else ratio >= self.asked

    def says(self) -> str:
        if self.against in SHARES:
            return f"≥ {self.asked:.0%}"
        return f"≤ {self.most:g}×" if self.most else f"≥ {self.asked:g}×"


def _imq(n: int, d: int, sides: str = "both gradients") -> str:
    return f"IMQ-7, {n} x {n} x {d}, {sides}"


STEP = "step, noise and prior, fp32, 1024x3x64x64"
RING = "top-1 of 8000 x 80000 x 64, a thread each"
VGG_256 = "LPIPS-vgg, 2x3x256x256, gradient to one image"
BARS = [
    Bar("mmd", _imq(4096, 64), "torch.compile", 11),
    Bar("mmd", _imq(4096, 64), "eager", 80),
    Bar("mmd", _imq(4096, 8), BEST, 25),
    Bar("mmd", _imq(128, 8, "one gradient"), "torch.compile", 6),
    Bar("langevin", STEP, "eager", 18),
    Bar("langevin", STEP, "add", most=2),
    Bar("perceptual", "LPIPS from VGG features, 4x128x128, contiguous", "eager", 8),
    Bar("perceptual", "LPIPS-vgg, 2x3x64x64, gradient to one image", "eager", 1.8),
    Bar("nearest", "top-1 of 10000 x 10000 x 64", "faiss", 2.2),
    Bar("nearest", "top-1 of 10000 x 10000 x 784", "faiss", 1.5),
    Bar("nearest", RING, "fastgen", 1.7, own="fastgen, 2 processes"),
    Bar("mmd", _imq(16_384, 64), "eager", 70, on=GPU),
    Bar("mmd", _imq(16_384, 64), BEST, 5, on=GPU),
    Bar("mmd", _imq(16_384, 64), FLOOR, 0.5, on=GPU),
    Bar("mmd", _imq(128, 8, "one gradient"), "eager", 10, on=GPU),
    Bar("langevin", STEP, COPY, 0.9, on=GPU),
    Bar("langevin", "chain of 20 steps, small network, 64x3x32x32", "eager", 3, on=GPU),
    Bar("perceptual", VGG_256, "lpips", 1.9, on=GPU),
    Bar("perceptual", VGG_256, "lpips", 3, own="fastgen, bf16", on=GPU),
    Bar("perceptual", VGG_256, "torch.compile, bf16", 1.8, own="fastgen, bf16", on=GPU),
    Bar("perceptual", "GLANN's loss, 16x3x32x32, gradient to one image", "eager", 4, on=GPU),
    *(
        Bar("nearest", f"top-1 of 1000000 x 1000000 x {d}", against, asked, on=GPU)
        for d in (128, 800)
        for against, asked in (("faiss", 8), ("flash-kmeans", 1.3))
    ),
]


# What they take tells who would be beyond patience at a million.
SMALLER = tuple(("nearest", f"top-1 of 100000 x 100000 x {d}") for d in (128, 800))


def urgent_first(works: list[Work]) -> list[Work]:
    """On a GPU, whose time may end at any work: those that something is asked of, the longest of them last; then the
    others as they come."""
    asked = {(bar.family, bar.work) for bar in BARS if bar.on == GPU}

    def rank(work: Work) -> tuple[int, float]:
        of = work.family, work.name
        if of in SMALLER or (of in asked and work.once):
            return 1, work.operations
        return 0 if of in asked else 2, 0.0

    return sorted(works, key=rank)


def text(content: dict[str, Any]) -> str:
    """The bars of this kind of machine as a Markdown table; empty where the file has none of their works."""
    rows, on = content["rows"], {"cpu": CPU, "cuda": GPU}[content["machine"]["type"]]
    bars = [bar for bar in BARS if bar.on == on]
    if not {(bar.family, bar.work) for bar in bars} & set(results.grouped(rows)):
        return ""
    lines = [
        f"What was asked of {on}.",
        "",
        "| work | ours | against | asked | measured | |",
        "|---|---|---|---|---|---|",
    ]
    for bar in bars:
        ratio = bar.measured(rows)
        measured = "" if ratio is None else f"{ratio:.1%}" if bar.against in SHARES else f"{ratio:.2f}×"
        met = "not measured" if ratio is None else "met" if bar.met(ratio) else "**not met**"
        cells = [f"{bar.family}: {bar.work}", bar.own, bar.against, bar.says(), measured, met]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
