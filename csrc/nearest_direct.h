#pragma once
#include <cstdint>

namespace fastgen {

// ‖q − b‖² of d coordinates: coordinate t is squared and added in float64 to sum t mod 8, the eight are halved three times,
// and what is left is rounded once. The same bits on every instruction set.
float direct(const float* q, const float* b, int64_t d);
float direct(const double* q, const double* b, int64_t d);

}  // namespace fastgen
