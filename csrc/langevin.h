// The Langevin step and its noise. fastgen/reference/langevin.py says what they mean; the bits are the same.
#pragma once
#include <cstdint>

#include "type.h"

namespace fastgen {

struct LangevinStep {
    void* x;            // [chains, elements], contiguous, as all that follows
    const void* grad;   // null: x is overwritten with the noise itself
    void* lookahead;    // of x's type, or null
    double* stats;      // [chains, 3]: gradient norm, elements clamped, elements not finite; or null
    const int64_t* chain_id;    // [chains], or null for 0, 1, ...
    const void* step_sizes;     // [chains] of the compute type, or null for step_size
    const void* noise_scales;   // likewise
    int64_t chains, elements;
    double step_size, noise_scale, precision, grad_clip, low, high, lookahead_size;
    bool noise_first;
    uint64_t seed;
    uint32_t step;  // the second counter word: purpose and step
    Type type;
    int threads;
};

// The end of a MALA step from s.x to `proposal`, made with s's scalars, seed and step: the noise is made again.
struct LangevinAccept {
    LangevinStep s;             // x and grad are overwritten where the proposal is accepted; float32 or float64
    const void *proposal, *proposal_grad;
    const double *energy, *proposal_energy;  // [chains]
    uint32_t accept_step;       // the second counter word of the draw that decides
    double* log_alpha;          // [chains]
    bool* accepted;             // [chains]
};

void langevin(const LangevinStep& step);
void langevin_words(const LangevinStep& step);  // the stream's raw words into x
void langevin_accept(const LangevinAccept& end);
void philox_words(const uint32_t* counter, int64_t count, uint64_t seed, uint32_t* words);  // [count, 4] each

}  // namespace fastgen
