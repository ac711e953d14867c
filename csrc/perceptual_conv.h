#pragma once
#include <cstdint>

namespace fastgen {

// A convolution of 3x3 kernels, stride 1 and a frame of one zero, channels_last; `in` and `out` are multiples of 16.
struct Conv3x3 {
    const float *x, *mask;       // [n, h, w, in]; x counts as 0 where a mask, which may be null, is at most 0
    const float *kernel, *bias;  // [16, out / 16, in, 16], see perceptual_conv.inl; null or [out]
    float* y;                    // [n, h, w, out]
    int64_t n, h, w, in, out;
    bool relu;  // of y
    int threads;
};

void conv3x3(const Conv3x3& conv);

}  // namespace fastgen
