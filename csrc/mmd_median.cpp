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
