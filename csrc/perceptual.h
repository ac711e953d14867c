#pragma once
#include <cstdint>

#include "type.h"

namespace fastgen {

// Maps f and what is written like them are of `type`, all other numbers double where that is float64, else float.

// Maps [n, c, pixels], or [n, pixels, c] where last.
struct LpipsLayer {
    const void *f0, *f1, *weight, *grad;  // [c] and [n]
    void *value, *kept;                   // [n]; null or [4, n, pixels], what the gradient needs of each pixel
    void *out0, *out1;                    // where value is null, from what was kept: the gradients of one or both maps
    int64_t n, c, pixels;
    double eps;
    bool inside, last;
    Type type;
    int threads;
};

// f [n, c, pixels], weight [c] -> out [n, dim], or with grad [n, dim] the gradient of f, in its place; dim at least 64.
struct LpipsProject {
    const void *f, *weight, *grad;
    void* out;
    int64_t n, c, pixels, dim, layer;
    uint64_t seed;
    double eps;
    bool inside;
    Type type;
    int threads;
};

// Vectors [n, size] of the same order of elements.
struct FeatureDistance {
    const void *f0, *f1, *grad;
    void *value, *out;  // one of them is null
    int64_t n, size;
    bool squared;
    Type type;
    int threads;
};

void lpips_layer(const LpipsLayer& layer);
void lpips_project(const LpipsProject& layer);
void feature_distance(const FeatureDistance& vectors);

}  // namespace fastgen
