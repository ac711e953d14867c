#if VEC_BYTES == 64  // of the loop below GCC 12 makes halves, and takes a third longer
static inline __m512d wide(const float* x) { return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(x)); }
static inline __m512d wide(const double* x) { return _mm512_loadu_pd(x); }
#endif

template <class T>
float direct_of(const T* q, const T* b, int64_t d) {
    double part[8] = {};
    int64_t t = 0;
#if VEC_BYTES == 64
    __m512d sums = _mm512_setzero_pd();
    for (; t + 8 <= d; t += 8) {
        const __m512d step = wide(q + t) - wide(b + t);
        sums += step * step;
    }
    std::memcpy(part, &sums, sizeof part);
#else
    for (; t + 8 <= d; t += 8)
        for (int l = 0; l < 8; ++l) {
            const double step = double(q[t + l]) - double(b[t + l]);
            part[l] += step * step;
        }
#endif
    for (int l = 0; t < d; ++t, ++l) {
        const double step = double(q[t]) - double(b[t]);
        part[l] += step * step;
    }
    for (int l = 0; l < 4; ++l) part[l] += part[l + 4];
    for (int l = 0; l < 2; ++l) part[l] += part[l + 2];
    return float(part[0] + part[1]);
}
