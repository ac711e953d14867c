"""Another version of fastgen beside ours: a worktree of a git ref, its extension built, in a process of its own.

Our benchmark files drive both, so that the same inputs go to both and rounds interleave; only the package differs.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.families import works
from benchmarks.harness import Local, Work, tensors


@contextlib.contextmanager
def worktree(ref: str) -> Iterator[Path]:
    """A checkout of `ref` with its extension built in place, gone afterwards."""
    git = ["git", "-C", str(machine.ROOT)]
    with tempfile.TemporaryDirectory(prefix="fastgen-base-") as folder:
        tree = Path(folder) / "tree"
        made = subprocess.run([*git, "worktree", "add", "--detach", str(tree), ref], capture_output=True, text=True)
        if made.returncode:
            raise ValueError(f"--base: expected a git ref of this checkout, got {ref!r}: {made.stderr.strip()}")
        try:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            built = subprocess.run(
                build, cwd=tree, capture_output=True, text=True, env={**os.environ, "FASTGEN_REQUIRE_EXT": "1"}
            )
            if built.returncode:
                raise RuntimeError(f"--base: the extension of {ref} does not build: {built.stderr.strip()[-500:]}")
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], capture_output=True)


class Remote:
    """A provider that is ready in the other process."""

    def __init__(self, other: "Other", number: int) -> None:
        self.other, self.number = other, number

    def result(self) -> Any:
        self.other.ask(do="result", number=self.number, file=str(self.other.file))
        found = torch.load(self.other.file, weights_only=True)
        return found if len(found) > 1 else found[0]

    def seconds(self, at_least: float) -> float:
        return float(self.other.ask(do="seconds", number=self.number, at_least=at_least)["seconds"])


class Other:
    """The process in which `import fastgen` finds the package of `tree`."""

    def __init__(self, tree: Path, scale: str, device: torch.device) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fastgen-base-")
        self.file = Path(self.folder.name) / "result.pt"
        command = [sys.executable, "-m", "benchmarks", "_base", str(tree), scale, device.type]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=machine.ROOT, text=True
        )

    def ready(self, work: Work, provider: str) -> Remote:
        answer = self.ask(do="setup", family=work.family, work=work.name, provider=provider)
        return Remote(self, int(answer["number"]))

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"failed": "the process of the other version ended"}
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


def serve(tree: str, scale: str, device: str) -> int:
    """The other end. `fastgen` must not be loaded yet: families import it where they use it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert "fastgen" not in sys.modules
    sys.path.insert(0, tree)
    import fastgen

    if not str(fastgen.__file__).startswith(tree):
        raise RuntimeError(f"fastgen came from {fastgen.__file__}, not from {tree}")
    ready: list[Local] = []
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if question["do"] == "setup":
                ready.clear()  # one work at a time: its inputs are the largest thing here
                found = next(w for w in works(question["family"], scale) if w.name == question["work"])
                where = torch.device(device)
                ready.append(Local(found, question["provider"], found.inputs(where), where))
                answer["number"] = 0
            elif question["do"] == "result":
                result = [t.detach().cpu() for t in tensors(ready[question["number"]].result())]
                torch.save(result, question["file"])
            else:
                answer["seconds"] = ready[question["number"]].seconds(question["at_least"])
        except Exception as problem:
            answer["failed"] = f"{type(problem).__name__}: {problem}"[:300]
        print(json.dumps(answer), file=answers, flush=True)
    return 0
