#include "pages.h"
#include "perceptual.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

// Fused, x0·a0 − x1·a1 would keep the rounding of one product: identical maps must give exactly 0.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#define FASTGEN_BODY "perceptual.inl"
#include "each_isa.h"

namespace fastgen {

void lpips_layer(const LpipsLayer& layer) {
    for (void* out : {layer.out0, layer.out1}) large_pages(out, layer.n * layer.c * layer.pixels * bytes_of(layer.type));
    FASTGEN_DISPATCH(lpips_layer, layer);
}

void lpips_project(const LpipsProject& layer) {
    if (layer.grad != nullptr) large_pages(layer.out, layer.n * layer.c * layer.pixels * bytes_of(layer.type));
    FASTGEN_DISPATCH(lpips_project, layer);
}

void feature_distance(const FeatureDistance& vectors) {
    large_pages(vectors.out, vectors.n * vectors.size * bytes_of(vectors.type));
    FASTGEN_DISPATCH(feature_distance, vectors);
}

}  // namespace fastgen
