// A fused multiply-add would round otherwise: products and sums round apart.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "nearest_direct.h"

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#define FASTGEN_BODY "nearest_direct.inl"
#include "each_isa.h"

namespace fastgen {

float direct(const float* q, const float* b, int64_t d) { return FASTGEN_DISPATCH(direct_of, q, b, d); }
float direct(const double* q, const double* b, int64_t d) { return FASTGEN_DISPATCH(direct_of, q, b, d); }

}  // namespace fastgen
