// A task is a block of pixels of one sample, both maps of which fit the second-level cache: norms, weighted sums and, for
// a gradient, what is written come from three passes over the block, the maps from memory once. Every pixel is computed
// alone and blocks are cut by shape only, so no result depends on the number of threads.

constexpr int64_t CACHED = 1 << 15;  // elements of one map in a block
constexpr int64_t SERIAL = 1 << 14;  // elements of one map that do not pay for a second thread

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

// In lanes, so that the order of the sum is the same whatever the compiler vectorises.
template <class T>
static inline double sum_of(const T* v, int64_t count) {
    double lanes[8] = {};
    const int64_t even = count / 8 * 8;
    for (int64_t i = 0; i < even; i += 8)
        for (int l = 0; l < 8; ++l) lanes[l] += double(v[i + l]);
    double rest = 0;
    for (int64_t i = even; i < count; ++i) rest += double(v[i]);
    return rest + ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

template <class T>
struct Lanes {
    static constexpr int count = VEC_BYTES / sizeof(T);
    typedef T V __attribute__((vector_size(VEC_BYTES)));

    static inline V load(const T* p) {
        V v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static inline void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }
    // Of the `left` elements that there are; `full` says at compile time that there are enough.
    template <bool full>
    static inline V load(const T* p, int64_t left) {
        if (full || left >= count) return load(p);
        V v{};
        std::memcpy(&v, p, size_t(left) * sizeof(T));
        return v;
    }
    template <bool full>
    static inline void store(T* p, V v, int64_t left) {
        std::memcpy(p, &v, full || left >= count ? sizeof v : size_t(left) * sizeof(T));
    }
};

template <class V, size_t... l>
static inline auto halves(V v, std::index_sequence<l...>) {
    return __builtin_shufflevector(v, v, int(l)...) + __builtin_shufflevector(v, v, int(sizeof...(l) + l)...);
}

template <class T, size_t count = VEC_BYTES / sizeof(T), class V>
static inline T lane_sum(V v) {
    if constexpr (count == 2)
        return v[0] + v[1];
    else
        return lane_sum<T, count / 2>(halves(v, std::make_index_sequence<count / 2>{}));
}

// A block of channel planes, copied strip by strip to [strips][c + 1][WIDTH]: planes lie a power of two apart, so in place
// they would evict each other from the cache (so would strips without the odd row), and a strip's sums stay in registers.
template <class T>
struct Block {
    using L = Lanes<T>;
    static constexpr int64_t WIDTH = 2 * L::count;
    const int64_t pitch;  // from strip to strip
    const std::unique_ptr<T[]> data;  // not cleared: that would cost a pass
    T *x0, *x1;

    Block(int64_t c, int64_t size) : pitch((c + 1) * WIDTH), data(new T[size_t(2 * pitch * strips(size))]) {
        x0 = data.get(), x1 = x0 + pitch * strips(size);
    }
    static int64_t strips(int64_t size) { return (size + WIDTH - 1) / WIDTH; }

    void pack(T* to, const T* from, const LpipsLayer& k, int64_t size) const {
        constexpr int64_t AHEAD = 4;  // rows lie on other pages, where the processor does not look by itself
        for (int64_t c = 0; c < k.c; ++c, to += WIDTH, from += k.pixels) {
            if (c + AHEAD < k.c)
                for (int64_t i = 0; i < size; i += 64 / int64_t(sizeof(T)))
                    __builtin_prefetch(from + AHEAD * k.pixels + i, 0, 2);
            T* strip = to;
            int64_t i = 0;
            for (; i + WIDTH <= size; i += WIDTH, strip += pitch) {
                L::store(strip, L::load(from + i));
                L::store(strip + L::count, L::load(from + i + L::count));
            }
            if (i == size) continue;
            std::fill(strip, strip + WIDTH, T(0));
            std::memcpy(strip, from + i, size_t(size - i) * sizeof(T));
        }
    }
    void unpack(T* to, const T* from, const LpipsLayer& k, int64_t size) const {
        for (int64_t c = 0; c < k.c; ++c, to += k.pixels, from += WIDTH) {
            const T* strip = from;
            int64_t i = 0;
            for (; i + WIDTH <= size; i += WIDTH, strip += pitch) {
                L::store(to + i, L::load(strip));
                L::store(to + i + L::count, L::load(strip + L::count));
            }
            if (i < size) std::memcpy(to + i, strip, size_t(size - i) * sizeof(T));
        }
    }
};

// Σ over a strip's pixels of the distance, or (each ≠ nullptr) the gradients in place of the maps.
template <class T>
static inline double strip(const LpipsLayer& k, T* x0, T* x1, const T* each) {
    using L = Lanes<T>;
    using V = typename L::V;
    constexpr int64_t WIDTH = Block<T>::WIDTH, HALF = L::count;
    const T *weight = static_cast<const T*>(k.weight), eps = T(k.eps);
    const int64_t end = k.c * WIDTH;

    V s0{}, s1{}, s2{}, s3{};
    for (int64_t c = 0; c < end; c += WIDTH) {
        const V u0 = L::load(x0 + c), u1 = L::load(x0 + c + HALF), v0 = L::load(x1 + c), v1 = L::load(x1 + c + HALF);
        s0 += u0 * u0, s1 += u1 * u1, s2 += v0 * v0, s3 += v1 * v1;
    }
    T square[2 * WIDTH], scale[2 * WIDTH], inverse[2 * WIDTH];
    L::store(square, s0), L::store(square + HALF, s1), L::store(square + WIDTH, s2), L::store(square + 3 * HALF, s3);
    for (int64_t i = 0; i < 2 * WIDTH; ++i) normalise(square[i], eps, k.inside, scale[i], inverse[i]);
    const V a0 = L::load(scale), a1 = L::load(scale + HALF), b0 = L::load(scale + WIDTH), b1 = L::load(scale + 3 * HALF);

    s0 = s1 = s2 = s3 = V{};
    if (each == nullptr) {
        for (int64_t c = 0; c < end; c += WIDTH, ++weight) {
            const V d0 = L::load(x0 + c) * a0 - L::load(x1 + c) * b0;
            const V d1 = L::load(x0 + c + HALF) * a1 - L::load(x1 + c + HALF) * b1;
            s0 += d0 * d0 * *weight, s1 += d1 * d1 * *weight;
        }
        L::store(square, s0), L::store(square + HALF, s1);
        return sum_of(square, WIDTH);
    }
    for (int64_t c = 0; c < end; c += WIDTH, ++weight) {
        const V u0 = L::load(x0 + c) * a0, v0 = L::load(x1 + c) * b0, d0 = (u0 - v0) * *weight;
        const V u1 = L::load(x0 + c + HALF) * a1, v1 = L::load(x1 + c + HALF) * b1, d1 = (u1 - v1) * *weight;
        s0 += u0 * d0, s1 += u1 * d1, s2 += v0 * d0, s3 += v1 * d1;
    }
    weight = static_cast<const T*>(k.weight);
    s0 *= L::load(inverse) * *each, s1 *= L::load(inverse + HALF) * *each;
    s2 *= L::load(inverse + WIDTH) * *each, s3 *= L::load(inverse + 3 * HALF) * *each;
    const V g0 = a0 * *each, g1 = a1 * *each, h0 = b0 * *each, h1 = b1 * *each;
    for (int64_t c = 0; c < end; c += WIDTH, ++weight) {
        const V u0 = L::load(x0 + c) * a0, v0 = L::load(x1 + c) * b0, d0 = (u0 - v0) * *weight;
        const V u1 = L::load(x0 + c + HALF) * a1, v1 = L::load(x1 + c + HALF) * b1, d1 = (u1 - v1) * *weight;
        L::store(x0 + c, d0 * g0 - u0 * s0), L::store(x0 + c + HALF, d1 * g1 - u1 * s1);
        if (k.out1 != nullptr) L::store(x1 + c, v0 * s2 - d0 * h0), L::store(x1 + c + HALF, v1 * s3 - d1 * h1);
    }
    return 0;
}

// Channels in planes. Returns Σ over the block's pixels of the distance, or writes the gradients and returns 0.
template <class T>
static double planes(const LpipsLayer& k, int64_t n, int64_t first, int64_t size, const Block<T>& block) {
    const int64_t offset = n * k.c * k.pixels + first;
    block.pack(block.x0, static_cast<const T*>(k.f0) + offset, k, size);
    block.pack(block.x1, static_cast<const T*>(k.f1) + offset, k, size);
    T each = 0;
    if (k.value == nullptr) each = T(2.0 / double(k.pixels)) * static_cast<const T*>(k.grad)[n];
    double total = 0;
    for (int64_t s = 0; s < block.strips(size); ++s) {
        T *x0 = block.x0 + s * block.pitch, *x1 = block.x1 + s * block.pitch;
        total += strip(k, x0, x1, k.value == nullptr ? &each : nullptr);
    }
    if (k.out0 != nullptr) block.unpack(static_cast<T*>(k.out0) + offset, block.x0, k, size);
    if (k.out1 != nullptr) block.unpack(static_cast<T*>(k.out1) + offset, block.x1, k, size);
    return total;
}

// Channels last: groups of pixels that stay in the nearest caches.
template <class T, bool full>
static double pixels_last(const LpipsLayer& k, int64_t n, int64_t first, int64_t size) {
    using L = Lanes<T>;
    using V = typename L::V;
    constexpr int64_t GROUP = 16;
    const T *weight = static_cast<const T*>(k.weight), eps = T(k.eps);
    const int64_t channels = k.c;
    double total = 0;
    for (int64_t start = 0; start < size; start += GROUP) {
        const int64_t offset = (n * k.pixels + first + start) * channels, count = std::min(GROUP, size - start);
        const T *f0 = static_cast<const T*>(k.f0) + offset, *f1 = static_cast<const T*>(k.f1) + offset;
        T square[2 * GROUP] = {}, scale[2 * GROUP], inverse[2 * GROUP], distance[GROUP];
        for (int64_t i = 0; i < count; ++i) {
            const T *x0 = f0 + i * channels, *x1 = f1 + i * channels;
            V s0{}, s1{};
            for (int64_t c = 0; c < channels; c += L::count) {
                const V u = L::template load<full>(x0 + c, channels - c), v = L::template load<full>(x1 + c, channels - c);
                s0 += u * u, s1 += v * v;
            }
            square[i] = lane_sum<T>(s0), square[GROUP + i] = lane_sum<T>(s1);
        }
        for (int64_t i = 0; i < 2 * GROUP; ++i) normalise(square[i], eps, k.inside, scale[i], inverse[i]);
        if (k.value != nullptr) {
            for (int64_t i = 0; i < count; ++i) {
                const T *x0 = f0 + i * channels, *x1 = f1 + i * channels, a = scale[i], b = scale[GROUP + i];
                V s{};
                for (int64_t c = 0; c < channels; c += L::count) {
                    const V u = L::template load<full>(x0 + c, channels - c) * a;
                    const V d = u - L::template load<full>(x1 + c, channels - c) * b;
                    s += d * d * L::template load<full>(weight + c, channels - c);
                }
                distance[i] = lane_sum<T>(s);
            }
            total += sum_of(distance, count);
            continue;
        }
        const T each = T(2.0 / double(k.pixels)) * static_cast<const T*>(k.grad)[n];
        for (int64_t i = 0; i < count; ++i) {
            const T *x0 = f0 + i * channels, *x1 = f1 + i * channels, a = scale[i], b = scale[GROUP + i];
            V s0{}, s1{};
            for (int64_t c = 0; c < channels; c += L::count) {
                const V u = L::template load<full>(x0 + c, channels - c) * a;
                const V v = L::template load<full>(x1 + c, channels - c) * b;
                const V d = (u - v) * L::template load<full>(weight + c, channels - c);
                s0 += u * d, s1 += v * d;
            }
            const T along0 = lane_sum<T>(s0) * (inverse[i] * each), along1 = lane_sum<T>(s1) * (inverse[GROUP + i] * each);
            T* out0 = static_cast<T*>(k.out0) + offset + i * channels;
            T* out1 = k.out1 == nullptr ? nullptr : static_cast<T*>(k.out1) + offset + i * channels;
            for (int64_t c = 0; c < channels; c += L::count) {
                const V u = L::template load<full>(x0 + c, channels - c) * a;
                const V v = L::template load<full>(x1 + c, channels - c) * b;
                const V d = (u - v) * L::template load<full>(weight + c, channels - c);
                L::template store<full>(out0 + c, d * (a * each) - u * along0, channels - c);
                if (out1 != nullptr) L::template store<full>(out1 + c, v * along1 - d * (b * each), channels - c);
            }
        }
    }
    return total;
}

template <class T>
static void lpips_layer_of(const LpipsLayer& k) {
    const int64_t most = std::max<int64_t>(32, std::min<int64_t>(1024, CACHED / k.c));
    const int64_t size = std::min(most, k.pixels), blocks = (k.pixels + size - 1) / size;
    std::vector<double> partial(size_t(k.n * blocks));
#pragma omp parallel num_threads(team(k.n* k.c* k.pixels, k.threads))
    {
        Block<T> scratch(k.c, k.last ? 0 : size);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < k.n * blocks; ++task) {
            const int64_t n = task / blocks, first = task % blocks * size, count = std::min(size, k.pixels - first);
            const bool full = k.c % Lanes<T>::count == 0;
            partial[size_t(task)] = !k.last ? planes<T>(k, n, first, count, scratch)
                                    : full  ? pixels_last<T, true>(k, n, first, count)
                                            : pixels_last<T, false>(k, n, first, count);
        }
    }
    if (k.value == nullptr) return;
    for (int64_t n = 0; n < k.n; ++n) {
        double sum = 0;
        for (int64_t b = 0; b < blocks; ++b) sum += partial[size_t(n * blocks + b)];
        static_cast<T*>(k.value)[n] = T(sum / double(k.pixels));
    }
}

static void lpips_layer(const LpipsLayer& k) {
    if (k.n == 0) return;
    k.wide ? lpips_layer_of<double>(k) : lpips_layer_of<float>(k);
}

template <class T, bool squared>
static void feature_distance_of(const FeatureDistance& k) {
    constexpr int64_t chunk = 1024, lanes = 16;
    const int64_t size = std::min<int64_t>(k.size, CACHED), blocks = (k.size + size - 1) / size;
    const double each = 1.0 / double(k.size);
    std::vector<double> partial(k.value == nullptr ? 0 : size_t(k.n * blocks));
#pragma omp parallel for schedule(static) num_threads(team(k.n* k.size, k.threads))
    for (int64_t task = 0; task < k.n * blocks; ++task) {
        const int64_t n = task / blocks, first = task % blocks * size, count = std::min(size, k.size - first);
        const T* __restrict f0 = static_cast<const T*>(k.f0) + n * k.size + first;
        const T* __restrict f1 = static_cast<const T*>(k.f1) + n * k.size + first;
        if (k.value == nullptr) {
            T* __restrict out = static_cast<T*>(k.out) + n * k.size + first;
            const T slope = T(squared ? 2 * each : each) * static_cast<const T*>(k.grad)[n];
            for (int64_t i = 0; i < count; ++i) {
                const T d = f0[i] - f1[i];
                const T sign = d > T(0) ? T(1) : d < T(0) ? T(-1) : d;  // 0 at a tie, NaN at NaN
                out[i] = (squared ? d : sign) * slope;
            }
            continue;
        }
        double total = 0;
        for (int64_t start = 0; start < count; start += chunk) {
            const int64_t end = std::min(start + chunk, count), even = start + (end - start) / lanes * lanes;
            T sums[lanes] = {};
            for (int64_t i = start; i < even; i += lanes)
                for (int64_t l = 0; l < lanes; ++l) {
                    const T d = f0[i + l] - f1[i + l];
                    sums[l] += squared ? d * d : std::abs(d);
                }
            for (int64_t i = even; i < end; ++i) {
                const T d = f0[i] - f1[i];
                sums[i - even] += squared ? d * d : std::abs(d);
            }
            total += sum_of(sums, lanes);
        }
        partial[size_t(task)] = total;
    }
    if (k.value == nullptr) return;
    for (int64_t n = 0; n < k.n; ++n) {
        double sum = 0;
        for (int64_t b = 0; b < blocks; ++b) sum += partial[size_t(n * blocks + b)];
        static_cast<T*>(k.value)[n] = T(sum * each);
    }
}

static void feature_distance(const FeatureDistance& k) {
    if (k.n == 0) return;
    if (k.wide)
        k.squared ? feature_distance_of<double, true>(k) : feature_distance_of<double, false>(k);
    else
        k.squared ? feature_distance_of<float, true>(k) : feature_distance_of<float, false>(k);
}

#include "perceptual_project.inl"
