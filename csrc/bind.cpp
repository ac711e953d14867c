// fastgen._C: raw buffers in, raw buffers out. Shapes, dtypes and contiguity are the callers' business (fastgen/ops).
#include <pybind11/pybind11.h>

#include "isa.h"

void bind_langevin(pybind11::module_& m);
void bind_mmd(pybind11::module_& m);
void bind_mmd_median(pybind11::module_& m);
void bind_nearest(pybind11::module_& m);
void bind_perceptual(pybind11::module_& m);

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of fastgen; private, called by fastgen.ops.";
    m.def("isa", &fastgen::isa_name, "The instruction set that the kernels run on.");
    m.def("set_isa", &fastgen::set_isa, "Choose a lesser instruction set (tests).");
    bind_langevin(m);
    bind_mmd(m);
    bind_mmd_median(m);
    bind_nearest(m);
    bind_perceptual(m);
}
