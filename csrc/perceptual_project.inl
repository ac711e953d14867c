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

template <class S>
static void lpips_project_of(const LpipsProject& k) {
    using T = typename Wide<S>::T;
    const int64_t row = std::is_same<S, T>::value ? 0 : k.pixels;  // of a channel, widened
#pragma omp parallel num_threads(team(k.n* k.c* k.pixels, k.threads))
    {
        const std::unique_ptr<T[]> scale(new T[size_t(k.pixels)]), sums(new T[size_t(k.dim + RUN)]), wide(new T[size_t(row)]);
        const auto plane = [&](int64_t n, int64_t c) -> const T* {
            const S* f = static_cast<const S*>(k.f) + (n * k.c + c) * k.pixels;
            if constexpr (std::is_same<S, T>::value) {
                return f;
            } else {
                copy(wide.get(), f, k.pixels);
                return wide.get();
            }
        };
#pragma omp for schedule(static)
        for (int64_t n = 0; n < k.n; ++n) {
            std::fill(scale.get(), scale.get() + k.pixels, T(0));
            for (int64_t c = 0; c < k.c; ++c) {
                const T* f = plane(n, c);
                for (int64_t p = 0; p < k.pixels; ++p) scale[p] += f[p] * f[p];
            }
            for (int64_t p = 0; p < k.pixels; ++p) {
                T inverse;
                normalise(scale[p], T(k.eps), k.inside, scale[p], inverse);
            }
            std::fill(sums.get(), sums.get() + k.dim + RUN, T(0));
            for (int64_t c = 0; c < k.c; ++c) {
                const T channel = T(std::sqrt(double(static_cast<const T*>(k.weight)[c]) / double(k.pixels)));
                const T* f = plane(n, c);
                for (int64_t p = 0; p < k.pixels; p += RUN) {
                    uint32_t words[4];
                    philox_words(uint32_t(p / RUN), uint32_t(c), uint32_t(k.layer), k.seed, words);
                    T* out = sums.get() + int64_t(uint64_t(words[2]) * uint64_t(k.dim) >> 32);
                    const int64_t count = std::min(RUN, k.pixels - p), half = std::min<int64_t>(32, count);
                    if (count == RUN) {
                        add_signed(out, f + p, &scale[p], channel, words[0], 32);
                        add_signed(out + 32, f + p + 32, &scale[p + 32], channel, words[1], 32);
                    } else {
                        add_signed(out, f + p, &scale[p], channel, words[0], half);
                        add_signed(out + 32, f + p + 32, &scale[p] + 32, channel, words[1], count - half);
                    }
                }
            }
            T* out = static_cast<T*>(k.out) + n * k.dim;
            for (int64_t i = 0; i < k.dim; ++i) out[i] = sums[i] + (i < RUN ? sums[k.dim + i] : T(0));
        }
    }
}

// Back: v of a pixel's channel is its bucket's gradient times sign and root, that of f then v·s − u (u·v) / r with the u, s
// and r of `normalise`. A task is a block of whole runs of a sample's pixels, with all their channels.
template <class S>
static void lpips_unproject_of(const LpipsProject& k) {
    using T = typename Wide<S>::T;
    constexpr int64_t BLOCK = 4 * RUN;
    const int64_t blocks = (k.pixels + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(team(k.n* k.c* k.pixels, k.threads))
    {
        const std::unique_ptr<T[]> grad(new T[size_t(k.dim + RUN)]);  // its first ones again behind it: a run may wrap
        T square[BLOCK], scale[BLOCK], inverse[BLOCK], along[BLOCK], f[BLOCK], v[BLOCK];
        int64_t whose = -1;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < k.n * blocks; ++task) {
            const int64_t n = task / blocks, first = task % blocks * BLOCK, size = std::min(BLOCK, k.pixels - first);
            if (n != whose) {
                const T* from = static_cast<const T*>(k.grad) + n * k.dim;
                std::copy(from, from + k.dim, grad.get());
                std::copy(from, from + RUN, grad.get() + k.dim);
                whose = n;
            }
            const auto at = [&](int64_t c) { return (n * k.c + c) * k.pixels + first; };
            const auto pull = [&](int64_t c) {
                const T channel = T(std::sqrt(double(static_cast<const T*>(k.weight)[c]) / double(k.pixels)));
                for (int64_t i = 0; i < size; i += RUN) {
                    uint32_t words[4];
                    philox_words(uint32_t((first + i) / RUN), uint32_t(c), uint32_t(k.layer), k.seed, words);
                    const T* from = grad.get() + int64_t(uint64_t(words[2]) * uint64_t(k.dim) >> 32);
                    for (int64_t half = 0; half < 2; ++half)
                        for (int64_t j = 0; j < RUN / 2; ++j) {  // whole runs: what lies beyond is not written
                            const T one = from[half * RUN / 2 + j] * channel;
                            v[i + half * RUN / 2 + j] = (words[half] >> j & 1u) ? -one : one;
                        }
                }
                copy(f, static_cast<const S*>(k.f) + at(c), size);
            };
            std::fill(square, square + size, T(0));
            for (int64_t c = 0; c < k.c; ++c) {
                copy(f, static_cast<const S*>(k.f) + at(c), size);
                for (int64_t i = 0; i < size; ++i) square[i] += f[i] * f[i];
            }
            for (int64_t i = 0; i < size; ++i) normalise(square[i], T(k.eps), k.inside, scale[i], inverse[i]);
            std::fill(along, along + size, T(0));
            for (int64_t c = 0; c < k.c; ++c) {
                pull(c);
                for (int64_t i = 0; i < size; ++i) along[i] += f[i] * scale[i] * v[i];
            }
            for (int64_t i = 0; i < size; ++i) along[i] *= inverse[i];
            for (int64_t c = 0; c < k.c; ++c) {
                pull(c);
                for (int64_t i = 0; i < size; ++i) v[i] = (v[i] - f[i] * along[i]) * scale[i];
                copy(static_cast<S*>(k.out) + at(c), v, size);
            }
        }
    }
}

template <class S>
static void lpips_either_way(const LpipsProject& k) {
    k.grad == nullptr ? lpips_project_of<S>(k) : lpips_unproject_of<S>(k);
}

static void lpips_project(const LpipsProject& k) {
    if (k.n == 0) return;
    switch (k.type) {
        case Type::float32: return lpips_either_way<float>(k);
        case Type::float64: return lpips_either_way<double>(k);
        case Type::bfloat16: return lpips_either_way<Bfloat16>(k);
        case Type::float16: return lpips_either_way<Float16>(k);
    }
}
