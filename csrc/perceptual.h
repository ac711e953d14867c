#pragma once
#include <cstdint>

namespace fastgen {

// Maps [n, c, pixels], or [n, pixels, c] where last; T is double where wide, else float, of everything behind a pointer.
struct LpipsLayer {
    const void *f0, *f1, *weight, *grad;  // [c] and [n]
    void *value, *out0, *out1;            // [n], or (where value is null) the gradients of one or both maps
    int64_t n, c, pixels;
    double eps;
    bool inside, last, wide;
    int threads;
};

// f [n, c, pixels], weight [c] -> out [n, dim]; dim at least 64.
struct LpipsProject {
    const void *f, *weight;
    void* out;
    int64_t n, c, pixels, dim, layer;
    uint64_t seed;
    double eps;
    bool inside, wide;
    int threads;
};

// Vectors [n, size] of the same order of elements.
struct FeatureDistance {
    const void *f0, *f1, *grad;
    void *value, *out;  // one of them is null
    int64_t n, size;
    bool squared, wide;
    int threads;
};

void lpips_layer(const LpipsLayer& layer);
void lpips_project(const LpipsProject& layer);
void feature_distance(const FeatureDistance& vectors);

}  // namespace fastgen
