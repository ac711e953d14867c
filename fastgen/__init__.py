"""fastgen: fused kernels for non-adversarial generative modelling in PyTorch.

`fastgen.functional` has the functions, `fastgen.nn` the modules, `fastgen.search` nearest-neighbour search,
`fastgen.models` the models built on them. Submodules load on first use: `import fastgen` itself loads torch alone.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["data", "functional", "metrics", "models", "nn", "ops", "reference", "report", "search"]


class _KernelsBeside(importlib.abc.MetaPathFinder):
    """Finds `fastgen.kernels` in a checkout, where it lies beside the package instead of inside it."""

    folder = Path(__file__).resolve().parent.parent / "kernels"

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "fastgen.kernels":
            return None
        return importlib.util.spec_from_file_location(
            name, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)]
        )


if not (Path(__file__).parent / "kernels").exists() and (_KernelsBeside.folder.parent / "csrc").is_dir():
    sys.meta_path.insert(0, _KernelsBeside())  # before the finder of another checkout's editable install


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"fastgen.{name}")
    raise AttributeError(f"module 'fastgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
