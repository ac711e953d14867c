// A task is a block of pixels of one sample, both maps of which fit the second-level cache: norms, weighted sums and, for
// a gradient, what is written come from three passes over the block, the maps from memory once. Every pixel is computed
// alone and blocks are cut by shape only, so no result depends on the number of threads.
#include "perceptual_maps.inl"

constexpr int64_t CACHED = 1 << 15;  // elements of one map in a block
constexpr int64_t SERIAL = 1 << 14;  // elements of one map that do not pay for a second thread
constexpr int64_t GROUP = 16;        // pixels in channels_last that stay in the nearest caches

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

// A block of channel planes, copied strip by strip to [strips][c + 1][WIDTH]: planes lie a power of two apart, so in place
// they would evict each other from the cache (so would strips without the odd row), and a strip's sums stay in registers.
template <class T>
struct Block {
    static constexpr int64_t HALF = Lanes<T>::count, WIDTH = 2 * HALF;
    const int64_t pitch, pixels;  // from strip to strip; whole strips
    const std::unique_ptr<T[]> data;  // not cleared: that would cost a pass
    T *x0, *x1, *scale0, *scale1, *along0, *along1;  // the maps; numbers of each pixel, for the gradient

    Block(int64_t c, int64_t size)
        : pitch((c + 1) * WIDTH), pixels((size + WIDTH - 1) / WIDTH * WIDTH),
          data(new T[size_t(2 * pitch * (pixels / WIDTH) + 4 * pixels)]) {
        x0 = data.get(), x1 = x0 + pitch * (pixels / WIDTH), scale0 = x1 + pitch * (pixels / WIDTH);
        scale1 = scale0 + pixels, along0 = scale1 + pixels, along1 = along0 + pixels;
    }

    template <class S>
    void pack(T* to, const S* from, const LpipsLayer& k, int64_t size) const {
        constexpr int64_t AHEAD = 4;  // rows lie on other pages, where the processor does not look by itself
        for (int64_t c = 0; c < k.c; ++c, to += WIDTH, from += k.pixels) {
            if (c + AHEAD < k.c)
                for (int64_t i = 0; i < size; i += 64 / int64_t(sizeof(S)))
                    __builtin_prefetch(from + AHEAD * k.pixels + i, 0, 2);
            T* strip = to;
            int64_t i = 0;
            for (; i + WIDTH <= size; i += WIDTH, strip += pitch) {
                store(strip, load(from + i));
                store(strip + HALF, load(from + i + HALF));
            }
            if (i == size) continue;
            std::fill(strip, strip + WIDTH, T(0));
            copy(strip, from + i, size - i);
        }
    }

    // Σ over a strip's pixels of the distance, or (each ≠ nullptr) what the gradients need of each pixel.
    double strip(const LpipsLayer& k, int64_t first, const T* each) const {
        using V = typename Lanes<T>::V;
        const T *f0 = x0 + first / WIDTH * pitch, *f1 = x1 + first / WIDTH * pitch;
        const T *weight = static_cast<const T*>(k.weight), eps = T(k.eps);
        const int64_t end = k.c * WIDTH;
        V s0{}, s1{}, s2{}, s3{};
        for (int64_t c = 0; c < end; c += WIDTH) {
            const V u0 = load(f0 + c), u1 = load(f0 + c + HALF), v0 = load(f1 + c), v1 = load(f1 + c + HALF);
            s0 += u0 * u0, s1 += u1 * u1, s2 += v0 * v0, s3 += v1 * v1;
        }
        T square[2 * WIDTH], scale[2 * WIDTH], inverse[2 * WIDTH];
        store(square, s0), store(square + HALF, s1), store(square + WIDTH, s2), store(square + 3 * HALF, s3);
        for (int64_t i = 0; i < 2 * WIDTH; ++i) normalise(square[i], eps, k.inside, scale[i], inverse[i]);
        const V a0 = load(scale), a1 = load(scale + HALF), b0 = load(scale + WIDTH), b1 = load(scale + 3 * HALF);

        s0 = s1 = s2 = s3 = V{};
        if (each == nullptr) {
            for (int64_t c = 0; c < end; c += WIDTH, ++weight) {
                const V d0 = load(f0 + c) * a0 - load(f1 + c) * b0;
                const V d1 = load(f0 + c + HALF) * a1 - load(f1 + c + HALF) * b1;
                s0 += d0 * d0 * *weight, s1 += d1 * d1 * *weight;
            }
            store(square, s0), store(square + HALF, s1);
            return sum_of(square, WIDTH);
        }
        for (int64_t c = 0; c < end; c += WIDTH, ++weight) {
            const V u0 = load(f0 + c) * a0, v0 = load(f1 + c) * b0, d0 = (u0 - v0) * *weight;
            const V u1 = load(f0 + c + HALF) * a1, v1 = load(f1 + c + HALF) * b1, d1 = (u1 - v1) * *weight;
            s0 += u0 * d0, s1 += u1 * d1, s2 += v0 * d0, s3 += v1 * d1;
        }
        store(scale0 + first, a0), store(scale0 + first + HALF, a1);
        store(scale1 + first, b0), store(scale1 + first + HALF, b1);
        store(along0 + first, s0 * (load(inverse) * *each));
        store(along0 + first + HALF, s1 * (load(inverse + HALF) * *each));
        store(along1 + first, s2 * (load(inverse + WIDTH) * *each));
        store(along1 + first + HALF, s3 * (load(inverse + 3 * HALF) * *each));
        return 0;
    }

    // Plane by plane straight to where they belong.
    template <class S, bool both>
    void gradients(const LpipsLayer& k, S* out0, S* out1, T each, int64_t size) const {
        using V = typename Lanes<T>::V;
        const T *weight = static_cast<const T*>(k.weight), *f0 = x0, *f1 = x1;
        for (int64_t c = 0; c < k.c; ++c, out0 += k.pixels, out1 += both ? k.pixels : 0, f0 += WIDTH, f1 += WIDTH)
            for (int64_t i = 0; i < size; i += HALF) {
                const int64_t at = i / WIDTH * pitch + i % WIDTH;
                const V a = load(scale0 + i), b = load(scale1 + i), u = load(f0 + at) * a, v = load(f1 + at) * b;
                const V d = (u - v) * weight[c];
                store<false>(out0 + i, d * (a * each) - u * load(along0 + i), size - i);
                if (both) store<false>(out1 + i, v * load(along1 + i) - d * (b * each), size - i);
            }
    }
};

// Channels in planes. Returns Σ over the block's pixels of the distance, or writes the gradients and returns 0.
template <class S, class T = typename Wide<S>::T>
static double planes(const LpipsLayer& k, int64_t n, int64_t first, int64_t size, const Block<T>& block) {
    const int64_t offset = n * k.c * k.pixels + first;
    block.pack(block.x0, static_cast<const S*>(k.f0) + offset, k, size);
    block.pack(block.x1, static_cast<const S*>(k.f1) + offset, k, size);
    T each = 0;
    if (k.value == nullptr) each = T(2.0 / double(k.pixels)) * static_cast<const T*>(k.grad)[n];
    double total = 0;
    for (int64_t i = 0; i < size; i += block.WIDTH) total += block.strip(k, i, k.value == nullptr ? &each : nullptr);
    S *out0 = static_cast<S*>(k.out0) + offset, *out1 = static_cast<S*>(k.out1) + offset;
    if (k.out1 != nullptr)
        block.template gradients<S, true>(k, out0, out1, each, size);
    else if (k.out0 != nullptr)
        block.template gradients<S, false>(k, out0, nullptr, each, size);
    return total;
}

// At most GROUP pixels in channels_last; the gradients may be written over the maps.
template <class T, bool full>
static double pixels(const LpipsLayer& k, const T* f0, const T* f1, T* out0, T* out1, T each, int64_t count) {
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
    if (k.value != nullptr) {
        for (int64_t i = 0; i < count; ++i) {
            const T *x0 = f0 + i * channels, *x1 = f1 + i * channels, a = scale[i], b = scale[GROUP + i];
            V s{};
            for (int64_t c = 0; c < channels; c += step) {
                const V d = load<full>(x0 + c, channels - c) * a - load<full>(x1 + c, channels - c) * b;
                s += d * d * load<full>(weight + c, channels - c);
            }
            distance[i] = lane_sum<T>(s);
        }
        return sum_of(distance, count);
    }
    for (int64_t i = 0; i < count; ++i) {
        const T *x0 = f0 + i * channels, *x1 = f1 + i * channels, a = scale[i], b = scale[GROUP + i];
        V s0{}, s1{};
        for (int64_t c = 0; c < channels; c += step) {
            const V u = load<full>(x0 + c, channels - c) * a, v = load<full>(x1 + c, channels - c) * b;
            const V d = (u - v) * load<full>(weight + c, channels - c);
            s0 += u * d, s1 += v * d;
        }
        const T along0 = lane_sum<T>(s0) * (inverse[i] * each), along1 = lane_sum<T>(s1) * (inverse[GROUP + i] * each);
        for (int64_t c = 0; c < channels; c += step) {
            const V u = load<full>(x0 + c, channels - c) * a, v = load<full>(x1 + c, channels - c) * b;
            const V d = (u - v) * load<full>(weight + c, channels - c);
            store<full>(out0 + i * channels + c, d * (a * each) - u * along0, channels - c);
            if (out1 != nullptr) store<full>(out1 + i * channels + c, v * along1 - d * (b * each), channels - c);
        }
    }
    return 0;
}

// Channels last, group by group; halves by way of `scratch`, two groups wide.
template <class S, bool full, class T = typename Wide<S>::T>
static double pixels_last(const LpipsLayer& k, int64_t n, int64_t first, int64_t size, T* scratch) {
    const T each = k.value == nullptr ? T(2.0 / double(k.pixels)) * static_cast<const T*>(k.grad)[n] : T(0);
    double total = 0;
    for (int64_t start = 0; start < size; start += GROUP) {
        const int64_t offset = (n * k.pixels + first + start) * k.c, count = std::min(GROUP, size - start);
        const S *f0 = static_cast<const S*>(k.f0) + offset, *f1 = static_cast<const S*>(k.f1) + offset;
        S* out0 = static_cast<S*>(k.out0) + offset;
        S* out1 = k.out1 == nullptr ? nullptr : static_cast<S*>(k.out1) + offset;
        if constexpr (std::is_same<S, T>::value) {
            total += pixels<T, full>(k, f0, f1, out0, out1, each, count);
        } else {
            T *x0 = scratch, *x1 = scratch + GROUP * k.c;
            copy(x0, f0, count * k.c), copy(x1, f1, count * k.c);
            total += pixels<T, full>(k, x0, x1, x0, out1 == nullptr ? nullptr : x1, each, count);
            if (k.value == nullptr) copy(out0, x0, count * k.c);
            if (out1 != nullptr) copy(out1, x1, count * k.c);
        }
    }
    return total;
}

template <class S>
static void lpips_layer_of(const LpipsLayer& k) {
    using T = typename Wide<S>::T;
    const int64_t most = std::max<int64_t>(32, std::min<int64_t>(1024, CACHED / k.c));
    const int64_t size = std::min(most, k.pixels), blocks = (k.pixels + size - 1) / size;
    std::vector<double> partial(size_t(k.n * blocks));
#pragma omp parallel num_threads(team(k.n* k.c* k.pixels, k.threads))
    {
        Block<T> block(k.c, k.last ? 0 : size);
        const std::unique_ptr<T[]> scratch(new T[size_t(k.last && sizeof(S) < sizeof(T) ? 2 * GROUP * k.c : 0)]);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < k.n * blocks; ++task) {
            const int64_t n = task / blocks, first = task % blocks * size, count = std::min(size, k.pixels - first);
            const bool full = k.c % Lanes<T>::count == 0;
            partial[size_t(task)] = !k.last ? planes<S>(k, n, first, count, block)
                                    : full  ? pixels_last<S, true>(k, n, first, count, scratch.get())
                                            : pixels_last<S, false>(k, n, first, count, scratch.get());
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
    switch (k.type) {
        case MapType::float32: return lpips_layer_of<float>(k);
        case MapType::float64: return lpips_layer_of<double>(k);
        case MapType::bfloat16: return lpips_layer_of<Bfloat16>(k);
        case MapType::float16: return lpips_layer_of<Float16>(k);
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
    const int64_t size = std::min<int64_t>(k.size, CACHED), blocks = (k.size + size - 1) / size;
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
        case MapType::float32: return feature_distance_of<float>(k);
        case MapType::float64: return feature_distance_of<double>(k);
        case MapType::bfloat16: return feature_distance_of<Bfloat16>(k);
        case MapType::float16: return feature_distance_of<Float16>(k);
    }
}

#include "perceptual_project.inl"
