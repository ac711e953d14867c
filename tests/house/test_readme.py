"""Every snippet and command of the README runs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
# What a training is cut down to by a test, by model.
SMALL = {
    "glann": "--data=digits --latent_dim=6 --width=4 --layers=[block0] --glo_epochs=1 --hidden=16 --imle_epochs=1 "
    "--pool=2",
    "deep-frame": "--layers=[pixels,stem] --chains=2 --n_steps=1 --epochs=1 --sample_steps=2",
    "frame": "--seeds=1 --epochs=1 '--options={width: 2, chains: 4, n_steps: 1, batch: 256}'",
    "imle": "--hidden=16 --epochs=2 --refresh=1 --batch=16",
}
COMMAND = "import sys; sys.argv[1:] = words; from fastgen.cli import main; sys.exit(main())"


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: re.findall(r"F\.\w+|nn\.\w+", s)[-1])
def test_snippet(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {})


def test_there_is_a_snippet_for_each_family() -> None:
    assert len(SNIPPETS) >= 5


def test_make_targets_exist() -> None:
    targets = {word for line in COMMANDS if line.startswith("make ") for word in line.split()[1:2]}
    targets |= set(re.findall(r"`make ([a-z-]+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr


def test_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in COMMANDS:
        if line.startswith("pip install"):
            for named in re.findall(r"\[(\w+)\]", line):
                assert named in extras


def test_fastgen_commands_in_order(tmp_path: Path, run_apart: Callable[..., list[Any]]) -> None:
    """As written, but on little data; in an empty folder, by the installed command's entry point."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    commands = [line for line in COMMANDS if line.startswith(("fastgen ", "torchrun "))]
    assert len(commands) >= 4
    for line in commands:
        before, _, after = line.partition("fastgen.cli " if line.startswith("torchrun") else "fastgen ")
        words = shlex.split(after)
        if words[0] in ("train", "compare"):
            words = [w for w in words if w != "mnist5k" and (w != "--data" or "mnist5k" not in words)]
            words += [*shlex.split(SMALL[words[1]]), "--trainer.enable_progress_bar=false"]
        if before:
            program = ["-m", "torch.distributed.run", "--standalone", *shlex.split(before)[1:], "fastgen.cli"]
            command = [sys.executable, *program, *words]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        else:
            (done,) = run_apart(COMMAND, 1, tmp_path, words=words)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "digits.png").exists()
    assert (tmp_path / "runs" / "glann" / "report.md").exists()
    assert (tmp_path / "runs" / "imle" / "samples.png").exists()
    assert json.loads((tmp_path / "runs" / "imle-by-two" / "run.json").read_text())["processes"] == 2


def test_pictures_exist() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).read_bytes()[:4] == b"\x89PNG"


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"^[A-Z_]{8,}$|\b(TODO|DEMO_TIME|GLANN_TABLE)\b", README, re.M)


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a checkout")
def test_nothing_names_a_machine_or_a_registry() -> None:
    words = ["py" + "pi.org", "/" + "work/", "download.py" + "torch", "files.python" + "hosted"]
    for word in words:
        done = subprocess.run(["git", "grep", "-lI", word], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout == "", f"{word} in {done.stdout}"
