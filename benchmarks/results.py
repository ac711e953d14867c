"""A result file, and what a terminal shows of it."""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, Work, seconds_text
from benchmarks.machine import BUSY


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Written beside and renamed: a kill leaves the old file whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def load(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"RESULTS: expected a file that `python -m benchmarks ... --out` wrote, got {path}: {error}"
        ) from None
    if not isinstance(content, dict) or not {"machine", "rows"} <= set(content):
        raise ValueError(f"RESULTS: expected a file that `python -m benchmarks ... --out` wrote, got {path}")
    return content


def begun(path: str | Path) -> Path:
    """A file beside the results: the work and the provider whose turn it is just now."""
    return Path(f"{path}.begun")


def note_begun(path: str | Path, work: Work, provider: str) -> None:
    begun(path).write_text(json.dumps({"family": work.family, "work": work.name, "provider": provider}))


def blame(path: str | Path, how: str) -> str | None:
    """The provider whose turn it was when a run ended by signal `how`, and a row that says so; None if nobody's."""
    if not begun(path).exists():
        return None
    content, last = load(path), json.loads(begun(path).read_text())
    begun(path).unlink()
    of = (last["family"], last["work"], last["provider"])
    content["rows"] = [row for row in content["rows"] if (row["family"], row["work"], row["provider"]) != of]
    content["rows"].append(last | {"status": "failed", "reason": f"it ended the process: {how}", "lost": True})
    save(path, content)
    return str(last["provider"])


def bytes_text(count: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def best_peer(rows: list[Row]) -> Row | None:
    """The fastest right row that is not ours and does the same work."""
    peers = [r for r in rows if "seconds" in r and not ours(r["provider"]) and r["provider"] != "add"]
    return min(peers, key=lambda r: r["seconds"], default=None)


def ours(provider: str) -> bool:
    return provider.split(",")[0].split("@")[0] == "fastgen"


def grouped(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["family"], row["work"]), []).append(row)
    return found


def time_text(row: Row) -> str:
    """Its time, and a word where others used the machine meanwhile."""
    return seconds_text(row["seconds"]) + (" (busy)" if row.get("other_load", 0.0) > BUSY else "")


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table; the ratio is against fastgen: above 1× fastgen is faster."""
    head = ["work", "provider", "time", "20/50/80 %", "fastgen is", "extra memory", "of a copy", "of a matmul", "error"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (_, work), group in grouped(rows).items():
        fastgen = next((r.get("seconds") for r in group if r["provider"] == "fastgen"), None)
        for row in group:
            cells = [work, row["provider"]]
            if row["status"] == "ok":
                cells.append(time_text(row))
                cells.append(" / ".join(seconds_text(q) for q in row["quantiles"]) if row["rounds"] > 1 else "once")
                cells.append(f"{row['seconds'] / fastgen:.2f}×" if fastgen and row["provider"] != "fastgen" else "")
                cells.append(bytes_text(row["peak_bytes"]) if row.get("peak_bytes") is not None else "")
                cells += [f"{row[k]:.1%}" if k in row else "" for k in ("share_of_copy", "share_of_matmul")]
                cells.append(f"{row['error']:.1e}" + (f", {row['right']:.2%} right" if "right" in row else ""))
            else:
                cells.append(f"**{row['status']}**")
                why = f"error {row['error']:.1e}" if row["status"] == "wrong" else row.get("reason", "")
                why += f", {row['right']:.2%} right" if "right" in row else ""
                cells += ["", "", "", "", "", why.replace("|", "/")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def warning(rows: list[Row]) -> str:
    """A sentence where others used the machine during the timings; empty where not."""
    loads = [row["other_load"] for row in rows if "other_load" in row]
    busy = [load for load in loads if load > BUSY]
    if not busy:
        return ""
    return (
        f"Warning: other processes kept up to {max(busy):.1f} cores busy during {len(busy)} of {len(loads)} timings; "
        "these are too long by an unknown amount, and their ratios off either way."
    )
