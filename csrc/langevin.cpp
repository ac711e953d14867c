#include "langevin.h"
#include "pages.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

// A fused multiply-add would give AVX2 and AVX-512 other bits than the baseline, Triton and the reference.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#define FASTGEN_BODY "langevin.inl"
#include "each_isa.h"

namespace fastgen {

// Chains without elements keep their statistics and proposals to the caller.
void langevin(const LangevinStep& s) {
    if (s.grad == nullptr) large_pages(s.x, s.chains * s.elements * bytes_of(s.type));
    if (s.chains > 0 && s.elements > 0) FASTGEN_DISPATCH(langevin, s);
}

void langevin_words(const LangevinStep& s) {
    large_pages(s.x, s.chains * s.elements * 4);
    if (s.chains > 0 && s.elements > 0) FASTGEN_DISPATCH(langevin_words, s);
}

void langevin_accept(const LangevinAccept& a) {
    if (a.s.chains > 0 && a.s.elements > 0) FASTGEN_DISPATCH(langevin_accept, a);
}

void philox_words(const uint32_t* counter, int64_t count, uint64_t seed, uint32_t* words) {
    FASTGEN_DISPATCH(philox_words, counter, count, seed, words);
}

}  // namespace fastgen
