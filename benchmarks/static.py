"""What the Triton kernels cost on sm_90 by their machine code alone: no GPU is needed, and nothing is run.

Each kernel of the ahead-of-time lists is compiled; of its innermost loop (or of all of it, where it has none) the
instructions are counted by the unit that executes them. With the units' rates that gives the cycles one
multiprocessor needs at best for a pair or an element, if the busiest unit never waits: a floor, not a forecast.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

# Warp instructions a clock and multiprocessor of compute capability 9.0 (CUDA C++ Programming Guide, table of the
# throughput of native arithmetic instructions, divided by 32 lanes).
RATES = {"fp32": 4.0, "alu": 2.0, "imad": 2.0, "mufu": 0.5, "fp64": 2.0, "issue": 4.0}
UNITS = {
    "fp32": ("FFMA", "FADD", "FMUL"),
    "imad": ("IMAD",),
    "mufu": ("MUFU", "F2F", "F2I", "I2F", "FRND"),
    "fp64": ("DFMA", "DADD", "DMUL", "DSETP"),
    "alu": (
        *("IADD3", "LOP3", "ISETP", "FSETP", "FMNMX", "IMNMX", "VIMNMX", "SEL", "FSEL", "SHF", "PRMT", "LEA"),
        *("F2FP", "PLOP3", "IABS", "FLO", "POPC", "VIADD", "MOV", "P2R", "R2P", "SGXT", "BMSK"),
    ),
}
TENSOR = 2048.0  # bf16 multiply-adds a clock and multiprocessor, dense: 989 TFLOP/s; half of it in TF32
SHARED_BYTES = 128.0  # a clock and multiprocessor
# A clock and multiprocessor: what a filter of nearest neighbours had of an H200 (260 GB in 31.3 ms), and 3.35 TB/s over
# 132 of them at 1.755 GHz.
L2_BYTES, DRAM_BYTES = 36.0, 14.5
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)\s*([^;]*);")
BRANCH = re.compile(r"`\((\.L_x?_?\w+)\)")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    modifiers: tuple[str, ...]
    target: str | None  # of a branch


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions in order, and the place of each label among them."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if line.startswith(".L") and line.rstrip().endswith(":"):
            labels[line.strip().rstrip(":")] = len(found)
        elif match := INSTRUCTION.search(line):
            address, opcode, modifiers, operands = match.groups()
            branch = BRANCH.search(operands) if opcode == "BRA" else None
            found.append(
                Instruction(
                    int(address, 16), opcode, tuple(modifiers.split(".")[1:]), branch.group(1) if branch else None
                )
            )
    return found, labels


def inner_loop(instructions: list[Instruction], labels: dict[str, int]) -> list[Instruction] | None:
    """The longest loop that holds no other; None where there is none (a branch to itself ends a program)."""
    spans = []
    for place, instruction in enumerate(instructions):
        start = labels.get(instruction.target or "", len(instructions))
        if start < place:
            spans.append((start, place + 1))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    if not inner:
        return None
    start, stop = max(inner, key=lambda span: span[1] - span[0])
    return instructions[start:stop]


def width(instruction: Instruction) -> int:
    """Bytes that one lane of a load or store moves."""
    for modifier in instruction.modifiers:
        if modifier in ("128", "64"):
            return int(modifier) // 8
        if modifier in ("U8", "S8"):
            return 1
        if modifier in ("U16", "S16"):
            return 2
    return 16 if instruction.opcode in ("LDSM", "STSM") else 4


def cost(instructions: list[Instruction], warps: int, *, streams: bool) -> dict[str, Any]:
    """Counts of one warp, and the cycles that each unit of a multiprocessor needs for all warps of a program.

    streams: whether global memory is read once (from DRAM), and not again and again (from L2)"""
    counts = Counter(i.opcode for i in instructions)
    cycles = {unit: sum(counts[name] for name in names) * warps / RATES[unit] for unit, names in UNITS.items()}
    cycles["issue"] = len(instructions) * warps / RATES["issue"]
    cycles["tensor"] = sum(tensor_cycles(i) for i in instructions) * warps / 4  # one instruction serves four warps
    shared = [i for i in instructions if i.opcode in ("LDS", "STS", "LDSM", "STSM")]
    cycles["shared"] = sum(32 * width(i) for i in shared) * warps / SHARED_BYTES
    outside = [i for i in instructions if i.opcode in ("LDG", "STG", "LDGSTS")]
    cycles["global"] = sum(32 * width(i) for i in outside) * warps / (DRAM_BYTES if streams else L2_BYTES)
    return {"counts": dict(counts), "cycles": cycles, "busiest": max(cycles, key=lambda unit: cycles[unit])}


def tensor_cycles(instruction: Instruction) -> float:
    """Of HGMMA.64xNxK, a product of four warps."""
    if instruction.opcode != "HGMMA":
        return 0.0
    shape = next((m for m in instruction.modifiers if re.fullmatch(r"\d+x\d+x\d+", m)), None)
    if shape is None:
        raise ValueError(f"an HGMMA without a shape at {instruction.address:#x}")
    m, n, k = map(int, shape.split("x"))
    return m * n * k / (TENSOR / 2 if "TF32" in instruction.modifiers else TENSOR)


def elements_of(constexprs: dict[str, Any], loop: bool) -> tuple[int, str]:
    """What one turn of the loop, or one program, handles, and its name; (0, "") where the names do not tell."""
    blocks = [v for k, v in constexprs.items() if k.startswith("BLOCK") and isinstance(v, int)]
    if loop and {"BLOCK_M", "BLOCK_N"} <= set(constexprs):
        pairs = int(constexprs["BLOCK_M"]) * int(constexprs["BLOCK_N"])
        if "INNER" in constexprs:  # a slab's product with the points: a turn takes some of its columns
            return pairs * int(constexprs["BLOCK_K"]), "product"
        if 0 < constexprs.get("DC", 0) < constexprs["DP"]:  # some of the coordinates
            return pairs * int(constexprs["DC"]), "product"
        return pairs, "pair"
    if not loop and isinstance(constexprs.get("GROUPS"), int):
        return 4 * int(constexprs["GROUPS"]), "element"
    if not loop and len(blocks) == 1:
        return blocks[0] * int(constexprs.get("DP", 1)), "element"
    return 0, ""


def analyse(family: str, index: int, every: bool) -> dict[str, Any]:
    """The row of one kernel: runs in a process of its own."""
    os.environ.pop("TRITON_INTERPRET", None)
    from fastgen.kernels import aot

    spec = list(aot.specs((family,), every))[index]
    row: dict[str, Any] = {"family": family, "kernel": spec.kernel.__name__, "name": spec.name}
    try:
        compiled = aot.compile_spec(spec, "sm_90")
        code = aot.machine_code(compiled)
        sass = aot.disassemble(compiled)
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    instructions, labels = parse(sass)
    loop = inner_loop(instructions, labels)
    streams = not any(i.opcode == "HGMMA" for i in instructions)
    row |= cost(loop or instructions, spec.num_warps, streams=streams)
    row["elements"], row["unit"] = elements_of(spec.constexprs, loop is not None)
    row |= {"registers": code["registers"], "shared": compiled.metadata.shared, "spill": code["stack"]}
    return row | {"warps": spec.num_warps, "looped": loop is not None}


def rows(families: list[str], workers: int, every: bool) -> list[dict[str, Any]]:
    """The kernels of the families, compiled on `workers` processes; one configuration of each, or every one."""
    os.environ.pop("TRITON_INTERPRET", None)
    from fastgen.kernels import aot

    tasks = [
        (family, i, every)
        for family in families
        for i, spec in enumerate(aot.specs((family,), every))
        if "sm_90" not in spec.never
    ]
    if workers == 1:
        return [analyse(*task) for task in tasks]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(analyse, *zip(*tasks, strict=True)))


COLUMNS = ("HGMMA", "FFMA+", "MUFU", "LDG", "STG", "LDS", "STS")


def table(found: list[dict[str, Any]]) -> str:
    """A Markdown table: counts are of a pair or an element where known, else of a warp's turn of the loop."""
    head = ["kernel", "registers", "shared", "spill", *COLUMNS, "cycles", "busiest", "then"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found:
        title = f"{row['family']}: {row['name']}"
        if "failed" in row:
            lines.append(f"| {title} | {row['failed'].replace('|', '/')} |" + " |" * (len(head) - 2))
            continue
        counts = Counter(row["counts"])
        lanes = 32 * row["warps"] / row["elements"] if row["elements"] else 1.0
        cells = [title, str(row["registers"]), str(row["shared"]), str(row["spill"])]
        for column in COLUMNS:
            if column == "HGMMA":  # one of them serves four warps: a whole number a warp says more than a fraction
                cells.append(str(counts["HGMMA"]))
                continue
            opcodes = {"FFMA+": UNITS["fp32"], "LDG": ("LDG", "LDGSTS")}.get(column, (column,))
            cells.append(f"{sum(counts[o] for o in opcodes) * lanes:.3g}")
        per = row["elements"] or 1
        order = sorted(row["cycles"], key=lambda unit: -row["cycles"][unit])
        of = f" a {row['unit']}" if row["unit"] else " a turn" if row["looped"] else " a program"
        cells += [f"{row['cycles'][order[0]] / per:.3g}{of}", order[0]]
        cells.append(f"{order[1]} {row['cycles'][order[1]] / per:.3g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    from fastgen.kernels import aot

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", nargs="*", choices=[*aot.FAMILIES, []], default=[])
    parser.add_argument("--all", action="store_true", help="every configuration, not one a kernel")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--out", metavar="FILE", help="the table as .md, or the rows as .json")
    arguments = parser.parse_args(argv)
    found = rows(arguments.family or list(aot.FAMILIES), arguments.workers, arguments.all)
    text = table(found) + "\n"
    print(text, end="")
    if arguments.out:
        with open(arguments.out, "w") as out:
            out.write(json.dumps(found, indent=1) if arguments.out.endswith(".json") else text)
    bad = [row for row in found if "failed" in row or row.get("spill")]
    for row in bad:
        said = row.get("failed") or f"spills {row['spill']} bytes"
        print(f"{row['family']}: {row['name']}: {said}", file=sys.stderr)
    return 1 if bad else 0
