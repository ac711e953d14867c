"""The one thing pyproject.toml cannot say: how the C++ extension is built.

Without a compiler the install goes on and fastgen uses its plain torch reference (`fastgen info` says which kernels
run); FASTGEN_REQUIRE_EXT=1 makes a failed build fatal.
"""

import os
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

extension = Pybind11Extension(
    "fastgen._C",
    sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h") + glob("csrc/*.inl")),
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
    extra_link_args=["-fopenmp"],
)
extension.optional = os.environ.get("FASTGEN_REQUIRE_EXT", "0") != "1"

with ParallelCompile(default=os.cpu_count() or 2):
    setup(ext_modules=[extension], cmdclass={"build_ext": build_ext})
