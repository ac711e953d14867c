"""`python -m benchmarks`: what it refuses, keeps and goes on with, and that every family lists its works."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_save_is_whole(harness: ModuleType, tmp_path: Path) -> None:
    from benchmarks import machine, results

    content = {"machine": machine.describe(CPU), "rows": [{"work": "w"}]}
    results.save(tmp_path / "deep" / "a.json", content)
    assert results.load(tmp_path / "deep" / "a.json") == json.loads(json.dumps(content))
    assert content["machine"]["torch"] == torch.__version__
    (tmp_path / "b.json").write_text('{"rows"')
    with pytest.raises(ValueError, match="RESULTS"):
        results.load(tmp_path / "b.json")


def test_every_family_lists_its_works(harness: ModuleType) -> None:
    from benchmarks.families import FAMILIES, works

    for family in FAMILIES:
        for scale in ("demo", "quick", "full", "huge"):
            found = works(family, scale)
            names = [work.name for work in found]
            assert len(names) == len(set(names))
            for work in found:
                # Plain torch takes seconds a call for a million streamed rows: there FAISS is the peer.
                peer = "faiss" if "streamed" in work.name else "eager"
                assert {"fastgen", peer} <= set(work.providers)
                assert work.series


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cuda"], "no CUDA device"),
        (["--provider", "nobody"], "expected one of"),
        (["--without", "nobody"], "--without: expected one of"),
        (["--provider", "fastgen", "--without", "fastgen"], "--without: expected something to be left"),
        (["--work", "nothing"], "--work"),
        (["--resume"], "--out"),
        (["--provider", "torch.compile, CUDA graph"], "expected one of"),
        (["--seconds", "0"], "--seconds: expected more than 0"),
        (["--patience", "-1"], "--patience: expected more than 0"),
        (["--quick", "--out", "/dev/null/a.json"], "--out: expected a file that can be written"),
        (["--base", "no-such-ref", "--quick"], "git ref"),
    ],
)
def test_command_line_refuses(
    harness: ModuleType, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.__main__ import main

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    try:
        status = main(["mmd", "--no-memory", *arguments])
    except SystemExit as ended:  # argparse's
        status = int(ended.code or 0)
    assert status == 2
    assert says in capsys.readouterr().err


def test_the_command_s_exit_status_is_main_s() -> None:
    command = [sys.executable, "-m", "benchmarks", "mmd", "--work", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "--work" in done.stderr


def test_what_a_resumed_run_keeps(harness: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import resumed

    about = {"device": "a", "threads": 2, "commit": "c", "torch": "2"}
    new: dict[str, Any] = {"machine": about, "scale": "full", "spent": {}, "rows": []}
    old = new | {"rows": [{"work": "w"}], "spent": {"mmd": 1.0}, "test": {"done": {}}}
    assert resumed(old, new) == {k: v for k, v in old.items() if k != "machine"}
    assert capsys.readouterr().err == ""
    assert resumed(old | {"scale": "quick"}, new) == {k: v for k, v in new.items() if k != "machine"} | {
        "test": {"done": {}}
    }
    assert "scale quick" in capsys.readouterr().err
    assert resumed(old | {"machine": about | {"commit": "d"}}, new) == {}
    assert "commit d" in capsys.readouterr().err
    assert resumed({"machine": about, "rows": []}, new) == {"rows": []}  # what a stage of `make gpu` wrote


def test_interrupted(harness: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import __main__ as command

    def stopped(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", stopped)
    assert command.main(["mmd"]) == 130
    assert "--resume goes on" in capsys.readouterr().err
