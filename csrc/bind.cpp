// fastgen._C: raw buffers in, raw buffers out. Shapes, dtypes and contiguity are the callers' business (fastgen/ops).
// The one file that knows Python: pybind11 takes longer to compile than most kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "isa.h"
#include "langevin.h"
#include "mmd.h"
#include "mmd_median.h"
#include "nearest.h"
#include "pages.h"
#include "perceptual.h"
#include "perceptual_conv.h"

namespace py = pybind11;

#include "langevin_bind.inl"
#include "mmd_bind.inl"
#include "mmd_median_bind.inl"
#include "nearest_bind.inl"
#include "perceptual_bind.inl"

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of fastgen; private, called by fastgen.ops.";
    m.def("isa", &fastgen::isa_name, "The instruction set that the kernels run on.");
    m.def("set_isa", &fastgen::set_isa, "Choose a lesser instruction set (tests).");
    m.def(
        "large_pages", [](uintptr_t data, int64_t bytes) { fastgen::large_pages(reinterpret_cast<void*>(data), bytes); },
        "For memory that is about to be written whole: pages.h.");
    bind_langevin(m);
    bind_mmd(m);
    bind_mmd_median(m);
    bind_nearest(m);
    bind_perceptual(m);
}
