// Distances are promised to the bit: a fused multiply-add would round otherwise than fastgen/reference/mmd_median.py.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "mmd_median.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#define FASTGEN_BODY "mmd_median.inl"
#include "each_isa.h"

namespace fastgen {

void median(const MedianArguments<float>& arguments) { FASTGEN_DISPATCH(median_of, arguments); }
void median(const MedianArguments<double>& arguments) { FASTGEN_DISPATCH(median_of, arguments); }

}  // namespace fastgen

namespace {

template <class T>
void run(uintptr_t x, uintptr_t y, uintptr_t value, uintptr_t pair, int64_t n, int64_t m, int64_t d, int64_t rank,
         bool same, int threads) {
    const fastgen::MedianArguments<T> arguments{reinterpret_cast<const T*>(x),
                                                reinterpret_cast<const T*>(y),
                                                reinterpret_cast<T*>(value),
                                                reinterpret_cast<int64_t*>(pair),
                                                n,
                                                m,
                                                d,
                                                rank,
                                                same,
                                                threads};
    pybind11::gil_scoped_release release;
    fastgen::median(arguments);
}

}  // namespace

void bind_mmd_median(pybind11::module_& m) {
    const char* doc = "mmd_median(x, y, value, pair, n, m, d, rank, same, threads): addresses of contiguous points.";
    m.def("mmd_median_f32", &run<float>, doc);
    m.def("mmd_median_f64", &run<double>, doc);
}
