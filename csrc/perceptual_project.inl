// A layer's part of LPIPS's embedding, projected as it is made: coordinate (channel c, pixel p) goes with a random sign to
// bucket (shift + p mod 64) mod dim, sign bits and shift being the Philox words of counter (p div 64, c, layer, 0). See
// fastgen/reference/perceptual.py. A task is a sample, so the sums' order does not depend on the number of threads.

constexpr int64_t RUN = 64;  // pixels that share a counter

static inline void philox_words(uint32_t c0, uint32_t c1, uint32_t c2, uint64_t seed, uint32_t* out) {
    uint32_t c3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(b >> 32) ^ c1 ^ k0, c1 = uint32_t(b);
        c2 = uint32_t(a >> 32) ^ c3 ^ k1, c3 = uint32_t(a);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

template <class T>
static inline void add_signed(T* out, const T* f, const T* scale, T channel, uint32_t signs, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
        const T v = f[j] * scale[j] * channel;
        out[j] += (signs >> j & 1u) ? -v : v;
    }
}

template <class T>
static void lpips_project_of(const LpipsProject& k) {
#pragma omp parallel num_threads(team(k.n* k.c* k.pixels, k.threads))
    {
        const std::unique_ptr<T[]> scale(new T[size_t(k.pixels)]), sums(new T[size_t(k.dim + RUN)]);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < k.n; ++n) {
            const T* f = static_cast<const T*>(k.f) + n * k.c * k.pixels;
            std::fill(scale.get(), scale.get() + k.pixels, T(0));
            for (int64_t c = 0; c < k.c; ++c)
                for (int64_t p = 0; p < k.pixels; ++p) scale[p] += f[c * k.pixels + p] * f[c * k.pixels + p];
            for (int64_t p = 0; p < k.pixels; ++p) {
                T inverse;
                normalise(scale[p], T(k.eps), k.inside, scale[p], inverse);
            }
            std::fill(sums.get(), sums.get() + k.dim + RUN, T(0));
            for (int64_t c = 0; c < k.c; ++c) {
                const T channel = T(std::sqrt(double(static_cast<const T*>(k.weight)[c]) / double(k.pixels)));
                for (int64_t p = 0; p < k.pixels; p += RUN) {
                    uint32_t words[4];
                    philox_words(uint32_t(p / RUN), uint32_t(c), uint32_t(k.layer), k.seed, words);
                    T* out = sums.get() + int64_t(uint64_t(words[2]) * uint64_t(k.dim) >> 32);
                    const int64_t count = std::min(RUN, k.pixels - p), half = std::min<int64_t>(32, count);
                    const T* from = f + c * k.pixels + p;
                    if (count == RUN) {
                        add_signed(out, from, &scale[p], channel, words[0], 32);
                        add_signed(out + 32, from + 32, &scale[p + 32], channel, words[1], 32);
                    } else {
                        add_signed(out, from, &scale[p], channel, words[0], half);
                        add_signed(out + 32, from + 32, &scale[p] + 32, channel, words[1], count - half);
                    }
                }
            }
            T* out = static_cast<T*>(k.out) + n * k.dim;
            for (int64_t i = 0; i < k.dim; ++i) out[i] = sums[i] + (i < RUN ? sums[k.dim + i] : T(0));
        }
    }
}

static void lpips_project(const LpipsProject& k) {
    if (k.n == 0) return;
    k.wide ? lpips_project_of<double>(k) : lpips_project_of<float>(k);
}
