"""What Triton's own launcher makes of real calls, compiled in a process of its own without the interpreter."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

COMPILE = """
for call, specs in calls.items():
    for spec in specs:
        row = aot.check(spec, "sm_90")  # the second time out of Triton's cache
        print(json.dumps({"call": call, "kernel": spec.name, "stack": row["stack"]}))
"""


@pytest.fixture
def compiled() -> Callable[[str], dict[str, list[str]]]:
    """Runs code that leaves `calls`, name -> what `aot.launched` found: the kernels of each call, none with a spill."""
    pytest.importorskip("triton")

    def run(code: str) -> dict[str, list[str]]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-c", "import json, torch\nfrom fastgen.kernels import aot\n" + code + COMPILE]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        made: dict[str, list[str]] = {}
        for line in done.stdout.splitlines():
            row = json.loads(line)
            assert not row["stack"], row
            made.setdefault(row["call"], []).append(row["kernel"].removeprefix("_").removesuffix("_kernel"))
        return made

    return run
