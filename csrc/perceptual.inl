// Forward, a task is a block of pixels of one sample, taken a strip at a time, both maps of which stay in the nearest caches:
// norms as they come from memory, then weighted sums from there. What a gradient needs of each pixel can be kept: the way
// back is then one pass over the maps, in the order they lie in. Every pixel is computed alone and blocks are cut by shape
// only, so no result depends on the number of threads.
#include "perceptual_maps.inl"

constexpr int64_t TASK = 1 << 15;    // elements of one map in a task
constexpr int64_t SERIAL = 1 << 14;  // elements of one map that do not pay for a second thread
constexpr int64_t GROUP = 16;        // pixels in channels_last that stay in the nearest caches
constexpr int64_t PAST = 4 << 20;    // bytes of a gradient that the second caches do not hold
constexpr int64_t SPAN = 1024;       // pixels whose four numbers stay in the nearest cache, on the way back

static int team(int64_t elements, int threads) {
    return int(std::max<int64_t>(1, std::min<int64_t>(threads, elements / SERIAL)));
}

// Of a pixel with Σf² = square: u = f·scale and, for the gradient, 1/r. See fastgen/reference/perceptual.py.
template <class T>
static inline void normalise(T square, T eps, bool inside, T& scale, T& inverse) {
    const T poison = square - square;  // NaN where the square overflowed
    const T r = std::sqrt(inside ? square + eps : square) + poison;
    const bool none = !inside && square == T(0);
    scale = none ? T(0) : T(1) / (inside ? r : r + eps);
    inverse = none ? T(1) : T(1) / r;
}

// What is kept of the pixels from the `at`-th on: scale0, scale1, along0 = Σ w u0 (u0 − u1) / r0, along1 = Σ w u1 (u1 − u0) / r1.
template <class T>
struct Kept {
    T *scale0, *scale1, *along0, *along1;

    Kept(const LpipsLayer& k, int64_t at) : scale0(static_cast<T*>(k.kept) + at) {
        scale1 = scale0 + k.n * k.pixels, along0 = scale1 + k.n * k.pixels, along1 = along0 + k.n * k.pixels;
    }
};

// WIDTH pixels of both maps out of channel planes, copied to [c][WIDTH]: planes lie a power of two apart, so in place they
// would evict each other from the cache before the second pass.
template <class T>
struct Strip {
    using V = typename Lanes<T>::V;
    static constexpr int64_t HALF = Lanes<T>::count, WIDTH = 2 * HALF, LINE = 64 / sizeof(T);
    const std::unique_ptr<T[]> data;  // not cleared: that would cost a pass
    T *x0, *x1;

    explicit Strip(int64_t c) : data(new T[size_t(2 * c * WIDTH + LINE)]) {
        x0 = data.get() + LINE - uintptr_t(data.get()) % 64 / sizeof(T), x1 = x0 + c * WIDTH;  // no vector in two lines
    }

    // Of one map; and Σf² of each pixel.
    template <class S>
    static void pack(T* to, T* square, const S* from, const LpipsLayer& k, int64_t left) {
        V square0{}, square1{};
        for (int64_t c = 0; c < k.c; ++c, to += WIDTH, from += k.pixels) {
            if (left < WIDTH) {
                std::fill(to, to + WIDTH, T(0));
                copy(to, from, left);
            } else {
                // The strip after this: planes lie on other pages, where the processor does not look by itself.
                for (int64_t i = 0; i < WIDTH; i += 64 / int64_t(sizeof(S))) __builtin_prefetch(from + WIDTH + i, 0, 2);
                store(to, load(from)), store(to + HALF, load(from + HALF));
            }
            const V u0 = load(to), u1 = load(to + HALF);
            square0 += u0 * u0, square1 += u1 * u1;
        }
        store(square, square0), store(square + HALF, square1);
    }

    // Σ of the distance over the n-th sample's pixels from `first` on, of which there are `left`.
    template <bool keep, class S>
    double distance(const LpipsLayer& k, int64_t n, int64_t first, int64_t left) const {
        const int64_t offset = n * k.c * k.pixels + first;
        T square[2 * WIDTH], scale[2 * WIDTH], inverse[2 * WIDTH];
        pack(x0, square, static_cast<const S*>(k.f0) + offset, k, left);
        pack(x1, square + WIDTH, static_cast<const S*>(k.f1) + offset, k, left);
        for (int64_t i = 0; i < 2 * WIDTH; ++i) normalise(square[i], T(k.eps), k.inside, scale[i], inverse[i]);
        const T *f0 = x0, *f1 = x1, *weight = static_cast<const T*>(k.weight);
        const V a0 = load(scale), a1 = load(scale + HALF), b0 = load(scale + WIDTH), b1 = load(scale + 3 * HALF);
        V sum0{}, sum1{}, s0{}, s1{}, s2{}, s3{};
        for (int64_t c = 0; c < k.c; ++c, f0 += WIDTH, f1 += WIDTH) {
            const V u0 = load(f0) * a0, v0 = load(f1) * b0, d0 = u0 - v0;
            const V u1 = load(f0 + HALF) * a1, v1 = load(f1 + HALF) * b1, d1 = u1 - v1;
            const V w0 = d0 * weight[c], w1 = d1 * weight[c];
            sum0 += d0 * w0, sum1 += d1 * w1;
            if (keep) s0 += u0 * w0, s1 += u1 * w1, s2 -= v0 * w0, s3 -= v1 * w1;
        }
        T distance[WIDTH];
        store(distance, sum0), store(distance + HALF, sum1);
        if (keep) {
            const Kept<T> kept(k, n * k.pixels + first);
            store<false>(kept.scale0, a0, left), store<false>(kept.scale1, b0, left);
            store<false>(kept.along0, s0 * load(inverse), left);
            store<false>(kept.along1, s2 * load(inverse + WIDTH), left);
            if (left > HALF) {
                left -= HALF;
                store<false>(kept.scale0 + HALF, a1, left), store<false>(kept.scale1 + HALF, b1, left);
                store<false>(kept.along0 + HALF, s1 * load(inverse + HALF), left);
                store<false>(kept.along1 + HALF, s3 * load(inverse + 3 * HALF), left);
            }
        }
        return sum_of(distance, WIDTH);
    }
};

// Channels in planes: Σ of the distance over a block's pixels.
template <class S, class T = typename Wide<S>::T>
static double planes(const LpipsLayer& k, int64_t n, int64_t first, int64_t size, const Strip<T>& strip) {
    constexpr int64_t width = Strip<T>::WIDTH;
    double total = 0;
    for (int64_t i = 0; i < size; i += width)
        total += k.kept == nullptr ? strip.template distance<false, S>(k, n, first + i, std::min(width, size - i))
                                   : strip.template distance<true, S>(k, n, first + i, std::min(width, size - i));
    return total;
}

// At most GROUP pixels in channels_last, from the `at`-th on.
template <class T, bool full>
static double pixels(const LpipsLayer& k, const T* f0, const T* f1, int64_t at, int64_t count) {
    using V = typename Lanes<T>::V;
    constexpr int64_t step = Lanes<T>::count;
    const T *weight = static_cast<const T*>(k.weight), eps = T(k.eps);
    const int64_t channels = k.c;
    T square[2 * GROUP] = {}, scale[2 * GROUP], inverse[2 * GROUP], distance[GROUP];
    for (int64_t i = 0; i < count; ++i) {
        const T *x0 = f0 + i * channels, *x1 = f1 + i * channels;
        V s0{}, s1{};
        for (int64_t c = 0; c < channels; c += step) {
            const V u = load<full>(x0 + c, channels - c), v = load<full>(x1 + c, channels - c);
            s0 += u * u, s1 += v * v;
        }
        square[i] = lane_sum<T>(s0), square[GROUP + i] = lane_sum<T>(s1);
    }
    for (int64_t i = 0; i < 2 * GROUP; ++i) normalise(square[i], eps, k.inside, scale[i], inverse[i]);
    const Kept<T> kept(k, at);
    for (int64_t i = 0; i < count; ++i) {
        const T *x0 = f0 + i * channels, *x1 = f1 + i * channels, a = scale[i], b = scale[GROUP + i];
        V sum{}, s0{}, s1{};
        for (int64_t c = 0; c < channels; c += step) {
            const V u = load<full>(x0 + c, channels - c) * a, v = load<full>(x1 + c, channels - c) * b, d = u - v;
            const V w = d * load<full>(weight + c, channels - c);
            sum += d * w, s0 += u * w, s1 -= v * w;
        }
        distance[i] = lane_sum<T>(sum);
        if (k.kept == nullptr) continue;
        kept.scale0[i] = a, kept.along0[i] = lane_sum<T>(s0) * inverse[i];
        kept.scale1[i] = b, kept.along1[i] = lane_sum<T>(s1) * inverse[GROUP + i];
    }
    return sum_of(distance, count);
}

// Channels last, group by group; halves by way of `scratch`, two groups wide.
template <class S, bool full, class T = typename Wide<S>::T>
static double pixels_last(const LpipsLayer& k, int64_t n, int64_t first, int64_t size, T* scratch) {
    double total = 0;
    for (int64_t start = 0; start < size; start += GROUP) {
        const int64_t at = n * k.pixels + first + start, count = std::min(GROUP, size - start);
        const S *f0 = static_cast<const S*>(k.f0) + at * k.c, *f1 = static_cast<const S*>(k.f1) + at * k.c;
        if constexpr (std::is_same<S, T>::value) {
            total += pixels<T, full>(k, f0, f1, at, count);
        } else {
            T *x0 = scratch, *x1 = scratch + GROUP * k.c;
            copy(x0, f0, count * k.c), copy(x1, f1, count * k.c);
            total += pixels<T, full>(k, x0, x1, at, count);
        }
    }
    return total;
}

template <class S>
static void lpips_layer_of(const LpipsLayer& k) {
    using T = typename Wide<S>::T;
    const int64_t most = std::max<int64_t>(32, std::min<int64_t>(1024, TASK / k.c));
    const int64_t size = std::min(most, k.pixels), blocks = (k.pixels + size - 1) / size;
    std::vector<double> partial(size_t(k.n * blocks));
#pragma omp parallel num_threads(team(k.n* k.c* k.pixels, k.threads))
    {
        const Strip<T> strip(k.last ? 0 : k.c);
        const std::unique_ptr<T[]> scratch(new T[size_t(k.last && sizeof(S) < sizeof(T) ? 2 * GROUP * k.c : 0)]);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < k.n * blocks; ++task) {
            const int64_t n = task / blocks, first = task % blocks * size, count = std::min(size, k.pixels - first);
            const bool full = k.c % Lanes<T>::count == 0;
            partial[size_t(task)] = !k.last ? planes<S>(k, n, first, count, strip)
                                    : full  ? pixels_last<S, true>(k, n, first, count, scratch.get())
                                            : pixels_last<S, false>(k, n, first, count, scratch.get());
        }
    }
    for (int64_t n = 0; n < k.n; ++n) {
        double sum = 0;
        for (int64_t b = 0; b < blocks; ++b) sum += partial[size_t(n * blocks + b)];
        static_cast<T*>(k.value)[n] = T(sum / double(k.pixels));
    }
}

// w (u0 − u1) scale0 − u0 along0 and, of the other side, w (u1 − u0) scale1 − u1 along1, times 2 grad / pixels.
template <bool full, bool both, bool past, class S, class V, class T>
static inline void slope(const S* f0, const S* f1, S* out0, S* out1, V a, V b, V along0, V along1, V weight, T each,
                         int64_t left) {
    const V u = load<full>(f0, left) * a, v = load<full>(f1, left) * b, d = (u - v) * weight;
    const V slope0 = (d * a - u * along0) * each, slope1 = (d * b + v * along1) * -each;
    if constexpr (past) {
        store_past(out0, slope0);
        if (both) store_past(out1, slope1);
    } else {
        store<full>(out0, slope0, left);
        if (both) store<full>(out1, slope1, left);
    }
}

template <class S, bool both, bool past, class T>
static void slopes(const LpipsLayer& k, int64_t n, int64_t first, int64_t size, T each) {
    using V = typename Lanes<T>::V;
    constexpr int64_t step = Lanes<T>::count;
    const Kept<T> kept(k, n * k.pixels + first);
    const T* weight = static_cast<const T*>(k.weight);
    const int64_t offset = n * k.c * k.pixels + first * (k.last ? k.c : 1);
    const S *f0 = static_cast<const S*>(k.f0) + offset, *f1 = static_cast<const S*>(k.f1) + offset;
    S *out0 = static_cast<S*>(k.out0) + offset, *out1 = both ? static_cast<S*>(k.out1) + offset : nullptr;
    const V none{};
    if (k.last) {
        for (int64_t i = 0; i < size; ++i, f0 += k.c, f1 += k.c, out0 += k.c, out1 += both ? k.c : 0) {
            const V a = none + kept.scale0[i], b = none + kept.scale1[i];
            const V along0 = none + kept.along0[i], along1 = none + kept.along1[i];
            int64_t c = 0;
            for (; c + step <= k.c; c += step)
                slope<true, both, past>(f0 + c, f1 + c, out0 + c, out1 + c, a, b, along0, along1, load(weight + c), each,
                                        step);
            if (c < k.c)
                slope<false, both, false>(f0 + c, f1 + c, out0 + c, out1 + c, a, b, along0, along1,
                                          load<false>(weight + c, k.c - c), each, k.c - c);
        }
        return;
    }
    for (int64_t c = 0; c < k.c; ++c, f0 += k.pixels, f1 += k.pixels, out0 += k.pixels, out1 += both ? k.pixels : 0) {
        const V w = none + weight[c];
        int64_t i = 0;
        for (; i + step <= size; i += step)
            slope<true, both, past>(f0 + i, f1 + i, out0 + i, out1 + i, load(kept.scale0 + i), load(kept.scale1 + i),
                                    load(kept.along0 + i), load(kept.along1 + i), w, each, step);
        if (i < size) {
            const int64_t left = size - i;
            slope<false, both, false>(f0 + i, f1 + i, out0 + i, out1 + i, load<false>(kept.scale0 + i, left),
                                      load<false>(kept.scale1 + i, left), load<false>(kept.along0 + i, left),
                                      load<false>(kept.along1 + i, left), w, each, left);
        }
    }
}

template <class S>
static bool aligned(const void* out, int64_t row) {
    return (reinterpret_cast<uintptr_t>(out) | uint64_t(row) * sizeof(S)) % VEC_BYTES == 0;
}

template <class S>
static void lpips_slopes_of(const LpipsLayer& k) {
    using T = typename Wide<S>::T;
    constexpr bool whole = std::is_same<S, T>::value;  // halves are not written a vector at a time
    const int64_t row = k.last ? k.c : k.pixels;
    const bool past = whole && k.n * k.c * k.pixels * int64_t(sizeof(S)) >= PAST && aligned<S>(k.out0, row) &&
                      aligned<S>(k.out1, row);
    const int64_t blocks = (k.pixels + SPAN - 1) / SPAN;
#pragma omp parallel for schedule(static) num_threads(team(k.n* k.c* k.pixels, k.threads))
    for (int64_t task = 0; task < k.n * blocks; ++task) {
        const int64_t n = task / blocks, first = task % blocks * SPAN, size = std::min(SPAN, k.pixels - first);
        const T each = T(2.0 / double(k.pixels)) * static_cast<const T*>(k.grad)[n];
        if (past) {
            k.out1 != nullptr ? slopes<S, true, whole>(k, n, first, size, each)
                              : slopes<S, false, whole>(k, n, first, size, each);
            fence();
        } else {
            k.out1 != nullptr ? slopes<S, true, false>(k, n, first, size, each)
                              : slopes<S, false, false>(k, n, first, size, each);
        }
    }
}

static void lpips_layer(const LpipsLayer& k) {
    if (k.n == 0) return;
    const bool back = k.value == nullptr;
    switch (k.type) {
        case Type::float32: return back ? lpips_slopes_of<float>(k) : lpips_layer_of<float>(k);
        case Type::float64: return back ? lpips_slopes_of<double>(k) : lpips_layer_of<double>(k);
        case Type::bfloat16: return back ? lpips_slopes_of<Bfloat16>(k) : lpips_layer_of<Bfloat16>(k);
        case Type::float16: return back ? lpips_slopes_of<Float16>(k) : lpips_layer_of<Float16>(k);
    }
}

// A chunk that stays in the nearest cache: halves are widened there.
template <class S>
struct Chunk {
    static constexpr int64_t size = 1024;
    using T = typename Wide<S>::T;
    T wide[std::is_same<S, T>::value ? 1 : size];

    const T* read(const S* from, int64_t count) {
        if constexpr (std::is_same<S, T>::value) {
            return from;
        } else {
            copy(wide, from, count);
            return wide;
        }
    }
    T* place(S* to) {
        if constexpr (std::is_same<S, T>::value)
            return to;
        else
            return wide;
    }
    void write(S* to, int64_t count) {
        if constexpr (!std::is_same<S, T>::value) copy(to, wide, count);
    }
};

template <class S, bool squared>
static void feature_distance_of(const FeatureDistance& k) {
    using T = typename Wide<S>::T;
    constexpr int64_t lanes = 16;
    const int64_t size = std::min<int64_t>(k.size, TASK), blocks = (k.size + size - 1) / size;
    const double each = 1.0 / double(k.size);
    std::vector<double> partial(k.value == nullptr ? 0 : size_t(k.n * blocks));
#pragma omp parallel for schedule(static) num_threads(team(k.n* k.size, k.threads))
    for (int64_t task = 0; task < k.n * blocks; ++task) {
        const int64_t n = task / blocks, first = task % blocks * size, count = std::min(size, k.size - first);
        Chunk<S> chunk0, chunk1, written;
        double total = 0;
        for (int64_t start = 0; start < count; start += chunk0.size) {
            const int64_t length = std::min(chunk0.size, count - start), at = n * k.size + first + start;
            const T* __restrict f0 = chunk0.read(static_cast<const S*>(k.f0) + at, length);
            const T* __restrict f1 = chunk1.read(static_cast<const S*>(k.f1) + at, length);
            if (k.value == nullptr) {
                T* __restrict out = written.place(static_cast<S*>(k.out) + at);
                const T slope = T(squared ? 2 * each : each) * static_cast<const T*>(k.grad)[n];
                for (int64_t i = 0; i < length; ++i) {
                    const T d = f0[i] - f1[i];
                    const T sign = d > T(0) ? T(1) : d < T(0) ? T(-1) : d;  // 0 at a tie, NaN at NaN
                    out[i] = (squared ? d : sign) * slope;
                }
                written.write(static_cast<S*>(k.out) + at, length);
                continue;
            }
            const int64_t even = length / lanes * lanes;
            T sums[lanes] = {};
            for (int64_t i = 0; i < even; i += lanes)
                for (int64_t l = 0; l < lanes; ++l) {
                    const T d = f0[i + l] - f1[i + l];
                    sums[l] += squared ? d * d : std::abs(d);
                }
            for (int64_t i = even; i < length; ++i) {
                const T d = f0[i] - f1[i];
                sums[i - even] += squared ? d * d : std::abs(d);
            }
            total += sum_of(sums, lanes);
        }
        if (k.value != nullptr) partial[size_t(task)] = total;
    }
    if (k.value == nullptr) return;
    for (int64_t n = 0; n < k.n; ++n) {
        double sum = 0;
        for (int64_t b = 0; b < blocks; ++b) sum += partial[size_t(n * blocks + b)];
        static_cast<T*>(k.value)[n] = T(sum * each);
    }
}

template <class S>
static void feature_distance_of(const FeatureDistance& k) {
    k.squared ? feature_distance_of<S, true>(k) : feature_distance_of<S, false>(k);
}

static void feature_distance(const FeatureDistance& k) {
    if (k.n == 0) return;
    switch (k.type) {
        case Type::float32: return feature_distance_of<float>(k);
        case Type::float64: return feature_distance_of<double>(k);
        case Type::bfloat16: return feature_distance_of<Bfloat16>(k);
        case Type::float16: return feature_distance_of<Float16>(k);
    }
}

#include "perceptual_project.inl"
