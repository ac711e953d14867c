"""What the stages of `make gpu` have in common: they keep what they did, and end the processes that they started."""

import concurrent.futures
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import machine, results

SECONDS = 560.0  # a stage stops of itself before ten minutes; the next call goes on
FOLDERS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")  # where tools lie that are not on the PATH


class Stage:
    """What a stage has done, kept in the device's result file."""

    def __init__(self, name: str, file: Path, about: dict[str, Any], seconds: float = SECONDS) -> None:
        self.name, self.file, self.about = name, file, about
        self.until = time.monotonic() + seconds
        content: dict[str, Any] = results.load(file) if file.exists() else {"machine": about, "rows": []}
        kept: dict[str, Any] = content.get(name, {})
        self.done: dict[str, Any] = kept.get("done", {}) if kept.get("commit") == about["commit"] else {}

    def left(self) -> float:
        return self.until - time.monotonic()

    def steps(self, names: list[str]) -> Iterator[str]:
        """Those of `names` that are not done yet, while there is time."""
        for name in names:
            if name in self.done:
                continue
            if self.left() < 0:
                break
            print(f"{self.name}: {name}", flush=True)
            yield name
        self.say(names)

    def each(self, names: list[str], do: Callable[[str], Any], together: int = 1) -> None:
        """Does and records those of `names` that are not done yet, several at a time; None is no outcome."""
        with concurrent.futures.ThreadPoolExecutor(together) as pool:

            def one(name: str) -> Any:
                if self.left() < 0:
                    return None
                print(f"{self.name}: {name}", flush=True)
                return do(name)

            doing = {pool.submit(one, name): name for name in names if name not in self.done}
            try:
                for future in concurrent.futures.as_completed(doing):
                    if (outcome := future.result()) is not None:
                        self.record(doing[future], outcome)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(_running):
                    _kill(process)
                raise
        self.say(names)

    def kept(self, step: str, done: "subprocess.CompletedProcess[str] | None", outcome: Any) -> Any:
        """The outcome; of a failed one all that was said goes into a log beside the results."""
        if done is not None and outcome["status"] == "failed":
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file.with_name(f"{self.file.stem}-{self.name}.log"), "a") as log:
                log.write(f"==== {step}\n{done.stdout}{done.stderr}\n")
        return outcome

    def say(self, names: list[str]) -> None:
        if left := [name for name in names if name not in self.done]:
            print(f"{self.name}: out of time, {len(left)} steps are left: {', '.join(left)}")

    def record(self, step: str, outcome: Any) -> None:
        self.done[step] = outcome
        content = results.load(self.file) if self.file.exists() else {"machine": self.about, "rows": []}
        content[self.name] = {"commit": self.about["commit"], "date": self.about["date"], "done": self.done}
        results.save(self.file, content)


def again(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks", "gpu", *arguments]


def tool(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, _folders())]))


def _folders() -> list[Path]:
    """The newest first."""
    return [found for folder in FOLDERS for found in sorted(Path("/").glob(folder[1:]), reverse=True)]


_running: set["subprocess.Popen[str]"] = set()


def ran(command: list[str], environment: dict[str, str], seconds: float) -> "subprocess.CompletedProcess[str] | None":
    """None where it takes longer: it and what it started are gone then."""
    process = subprocess.Popen(
        command,
        cwd=machine.ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _running.add(process)
    try:
        out, said = process.communicate(timeout=max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        _kill(process)
        print(f"out of time: {' '.join(command[-4:])}: {process.communicate()[0][-300:].strip()}", flush=True)
        return None
    finally:
        if process.poll() is None:
            _kill(process)
        _running.discard(process)
    return subprocess.CompletedProcess(command, process.returncode, out, said)


def _kill(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcome_of(done: "subprocess.CompletedProcess[str] | None", fine: tuple[int, ...]) -> dict[str, Any] | None:
    """pytest's 5 is a file without a test for this device."""
    if done is None:
        return None
    # Pytest's names of what failed end the output; beside them each of its workers may warn of something.
    out = done.stdout.strip().splitlines()[-12:]
    says = "\n".join([*out, *done.stderr.strip().splitlines()[len(out) - 15 :]])
    return {"status": "passed" if done.returncode in fine else "failed", "says": says}
