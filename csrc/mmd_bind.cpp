#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "mmd.h"

namespace py = pybind11;

namespace {

template <class T>
void run(uintptr_t x, uintptr_t y, const std::vector<uintptr_t>& out, int64_t batch, int64_t n, int64_t m, int64_t d,
         const std::string& kind, const std::vector<double>& parameters, int estimator, int threads) {
    fastgen::MmdArguments<T> arguments{reinterpret_cast<const T*>(x),
                                       reinterpret_cast<const T*>(y),
                                       reinterpret_cast<T*>(out.at(0)),
                                       out.size() > 1 ? reinterpret_cast<T*>(out[1]) : nullptr,
                                       out.size() > 2 ? reinterpret_cast<T*>(out[2]) : nullptr,
                                       batch,
                                       n,
                                       m,
                                       d,
                                       kind,
                                       parameters,
                                       estimator,
                                       threads};
    py::gil_scoped_release release;
    fastgen::mmd(arguments);
}

}  // namespace

void bind_mmd(py::module_& m) {
    const char* doc =
        "mmd(x, y, [value, gx, gy], batch, n, m, d, kind, parameters, estimator, threads): addresses of contiguous "
        "[batch, n, d] and [batch, m, d] points; gx and gy may be missing.";
    m.def("mmd_f32", &run<float>, doc);
    m.def("mmd_f64", &run<double>, doc);
}
