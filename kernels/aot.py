"""Compile every kernel ahead of time, without a GPU, and read the machine code.

    python -m fastgen.kernels.aot                 one configuration of each kernel, every target
    python -m fastgen.kernels.aot --all           every configuration of the launch table (make check-kernels)
    python -m fastgen.kernels.aot mmd --target sm_90

prints one JSON object a line. A family's kernel module lists what it launches as `aot_specs() -> list[Spec]`, the
configuration that the tests compile first.
"""

import argparse
import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAMILIES = ("mmd", "langevin", "perceptual", "nearest")
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TENSOR_MEMORY = 512  # columns of a multiprocessor of sm_100


@dataclass(frozen=True)
class Spec:
    """One launch of one kernel: everything that its machine code depends on."""

    name: str  # kernel and configuration, unique within the family
    kernel: Any  # the @triton.jit function
    signature: dict[str, Any]  # argument -> Triton type: "*fp32", "i64", "fp32", "constexpr", or a tuple of them
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    options: dict[str, Any] = field(default_factory=dict)  # enable_fp_fusion and the like
    divisible: tuple[str, ...] = ()  # integers that the launcher would find divisible by 16
    hip: dict[str, Any] = field(default_factory=dict)  # options that differ on AMD
    never: tuple[str, ...] = ()  # targets that the launcher never chooses this for


def launched(function: Callable[..., Any], *arguments: Any) -> list[Spec]:
    """The kernels that `function(*arguments)` launches, given CPU tensors: with the types, the constants for
    integers that are 1 and the alignments that Triton's own launcher finds. Nothing is executed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget(*TARGETS["sm_90"]))
    found: list[Spec] = []

    def keep(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, rest = bind(*args, **kwargs)
        options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, rest)
        parameters = list(bound)
        aligned = [parameters[path[0]] for path, attribute in attributes.items() if attribute]
        spec = Spec(
            kernel.__name__,
            kernel,
            signature,
            {parameters[path[0]]: value for path, value in constants.items()},
            options.num_warps,
            options.num_stages,
            {name: value for name, value in rest.items() if name not in ("num_warps", "num_stages")},
            tuple(name for name in aligned if not str(signature[name]).startswith("*")),
        )
        found.append(spec)

    with unittest.mock.patch.object(JITFunction, "run", keep):
        function(*arguments)
    return found


def compile_spec(spec: Spec, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(spec.signature)
    # Torch allocations are aligned: the launcher would specialise on it too.
    aligned = [n for n, kind in spec.signature.items() if str(kind).startswith("*") or n in spec.divisible]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    constexprs = dict(spec.constexprs)
    if "PTX" in spec.signature:  # such a kernel asks whether the target takes inline PTX
        constexprs["PTX"] = target.startswith("sm_")
    source = ASTSource(spec.kernel, dict(spec.signature), constexprs=constexprs, attrs=attrs)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
    options |= spec.hip if target.startswith("gfx") else {}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def _tool(name: str, *arguments: str, binary: bytes) -> str:
    """What one of the CUDA tools inside the triton wheel says of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary)
        done = subprocess.run([tool, *arguments, cubin], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def disassemble(compiled: Any) -> str:
    """The machine code of an sm_* binary, with labels."""
    return _tool("nvdisasm", "-c", binary=compiled.asm["cubin"])


def machine_code(compiled: Any) -> dict[str, Any]:
    """Registers, stack (spill) bytes and instruction counts of an sm_* binary, from cuobjdump and nvdisasm."""
    usage = _tool("cuobjdump", "-res-usage", binary=compiled.asm["cubin"])
    sass = disassemble(compiled)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass)
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]) + int(found["LOCAL"]),
        "opcodes": dict(collections.Counter(opcodes).most_common()),
        "wide_accesses": len(re.findall(r"\b(?:LDG|STG)\.E(?:\.\w+)*\.128\b", sass)),  # 16 bytes of global memory
    }


def check(spec: Spec, target: str) -> dict[str, Any]:
    compiled = compile_spec(spec, target)
    if (columns := getattr(compiled.metadata, "tmem_size", 0)) > TENSOR_MEMORY:
        # Its code is then empty, without a word, and the launcher refuses it.
        raise RuntimeError(f"needs {columns} columns of tensor memory, there are {TENSOR_MEMORY}")
    row: dict[str, Any] = {"kernel": spec.name, "target": target, "shared": compiled.metadata.shared}
    if target.startswith("sm_"):
        row.update(machine_code(compiled))
    return row


def specs(families: tuple[str, ...], every: bool) -> Iterator[Spec]:
    for family in families:
        listed: list[Spec] = importlib.import_module(f"fastgen.kernels.{family}").aot_specs()
        seen: set[tuple[str, str]] = set()
        for spec in listed:
            runs = {(spec.kernel.__name__, target) for target in TARGETS if target not in spec.never}
            if every or runs - seen:
                yield spec
            seen |= runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", choices=[*FAMILIES, []], default=[])
    parser.add_argument("--all", action="store_true", help="every configuration, not one a kernel")
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 turns the compiler off: unset it")
    failed = 0
    for spec in specs(tuple(arguments.family) or FAMILIES, arguments.all):
        for target in arguments.target or TARGETS:
            if target in spec.never:
                continue
            try:
                row = check(spec, target)
            except Exception as error:  # one kernel that does not compile must not hide the others
                failed += 1
                row = {"kernel": spec.name, "target": target, "error": f"{type(error).__name__}: {error}"}
            print(json.dumps(row), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
