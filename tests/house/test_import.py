"""`import fastgen` is light, works from anywhere, and works where the extras are not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LIGHT = """
import json, sys, time
import torch
start = time.perf_counter()
import fastgen
bare = time.perf_counter() - start
heavy = sorted(set(sys.modules) & {"triton", "faiss", "lightning", "matplotlib", "sklearn", "safetensors"})
from fastgen import functional, nn, search
all_of_it = time.perf_counter() - start
loaded = sorted(set(sys.modules) & {"triton", "faiss", "lightning", "matplotlib", "sklearn"})
print(json.dumps([bare, heavy, all_of_it, loaded, torch.cuda.is_initialized()]))
"""

WITHOUT = """
import sys
for name in ("triton", "faiss", "lightning", "jsonargparse", "matplotlib", "mlxtend", "sklearn"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
import fastgen
from fastgen import functional as F, nn, search
x, y = torch.randn(32, 4, requires_grad=True), torch.randn(16, 4)
F.mmd(x, y).backward()
F.nearest(y, x.detach())
F.langevin_step_(torch.zeros(2, 3), torch.zeros(2, 3), step_size=0.1, seed=1)
from fastgen.cli import main
assert main(["info"]) == 0
assert main(["train", "glann"]) == 2
print("fine")
"""


def python(code: str, *, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **env}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment)


def test_import_is_light_and_loads_no_extra() -> None:
    done = python(LIGHT)
    assert done.returncode == 0, done.stderr
    bare, heavy, all_of_it, loaded, cuda = json.loads(done.stdout)
    assert heavy == []
    assert loaded == []
    assert not cuda
    assert bare < 2
    assert all_of_it < 5


def test_base_dependencies_suffice() -> None:
    done = python(WITHOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("fine")
    assert "fastgen[train]" in done.stderr


def test_works_in_place_from_the_root() -> None:
    """A copy of the tree, not installed: kernels/ is found beside the package."""
    code = "import fastgen, fastgen.kernels; print(fastgen.__file__); print(fastgen.kernels.__file__)"
    done = python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    package, kernels = done.stdout.split()
    assert Path(package).is_relative_to(ROOT / "fastgen")
    assert Path(kernels).is_relative_to(ROOT / "kernels")


def test_a_missing_extension_falls_back_and_says_so(tmp_path: Path) -> None:
    """The package without its compiled part computes the same and warns once."""
    code = """
import sys, warnings
sys.modules["fastgen._C"] = None
import torch
from fastgen.ops import backend
backend.extension.cache_clear()
from fastgen import functional as F
x, y = torch.arange(24.).reshape(8, 3), torch.ones(5, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    a, b = F.mmd(x, y), F.mmd(x, y)
print(float(a), len([w for w in caught if "reference" in str(w.message)]))
print(backend.explain("mmd", "cpu"))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    value, warned = done.stdout.splitlines()[0].split()
    import torch

    from fastgen import functional as F

    assert float(value) == pytest.approx(float(F.mmd(torch.arange(24.0).reshape(8, 3), torch.ones(5, 3))), rel=1e-5)
    assert warned == "1"
    assert "compiler" in done.stdout
