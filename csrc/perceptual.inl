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
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int l = 0; l < 8; ++l) lanes[l] += double(v[i + l]);
    for (; i < count; ++i) lanes[i % 8] += double(v[i]);
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

template <class T>
struct Block {  // per pixel
    std::vector<T> data;
    T *a0, *a1, *i0, *i1, *t0, *t1;

    explicit Block(int64_t size) : data(6 * size) {
        T* p = data.data();
        a0 = p, a1 = p + size, i0 = p + 2 * size, i1 = p + 3 * size, t0 = p + 4 * size, t1 = p + 5 * size;
    }
};

// Channels in planes. Returns Σ over the block's pixels of the distance, or writes the gradients and returns 0.
template <class T>
static double planes(const LpipsLayer& k, int64_t n, int64_t first, int64_t size, Block<T>& s) {
    const int64_t offset = n * k.c * k.pixels + first;
    const T* weight = static_cast<const T*>(k.weight);
    const T* __restrict f0 = static_cast<const T*>(k.f0) + offset;
    const T* __restrict f1 = static_cast<const T*>(k.f1) + offset;
    T *__restrict a0 = s.a0, *__restrict a1 = s.a1, *__restrict i0 = s.i0, *__restrict i1 = s.i1;
    T *__restrict t0 = s.t0, *__restrict t1 = s.t1;
    const T eps = T(k.eps);

    for (int64_t i = 0; i < size; ++i) t0[i] = t1[i] = 0;
    for (int64_t c = 0; c < k.c; ++c) {
        const T *x0 = f0 + c * k.pixels, *x1 = f1 + c * k.pixels;
        for (int64_t i = 0; i < size; ++i) t0[i] += x0[i] * x0[i], t1[i] += x1[i] * x1[i];
    }
    for (int64_t i = 0; i < size; ++i) normalise(t0[i], eps, k.inside, a0[i], i0[i]);
    for (int64_t i = 0; i < size; ++i) normalise(t1[i], eps, k.inside, a1[i], i1[i]);

    for (int64_t i = 0; i < size; ++i) t0[i] = t1[i] = 0;
    if (k.value != nullptr) {
        for (int64_t c = 0; c < k.c; ++c) {
            const T *x0 = f0 + c * k.pixels, *x1 = f1 + c * k.pixels, w = weight[c];
            for (int64_t i = 0; i < size; ++i) {
                const T d = x0[i] * a0[i] - x1[i] * a1[i];
                t0[i] += w * d * d;
            }
        }
        return sum_of(t0, size);
    }
    for (int64_t c = 0; c < k.c; ++c) {
        const T *x0 = f0 + c * k.pixels, *x1 = f1 + c * k.pixels, w = weight[c];
        for (int64_t i = 0; i < size; ++i) {
            const T u0 = x0[i] * a0[i], u1 = x1[i] * a1[i], v = w * (u0 - u1);
            t0[i] += u0 * v;
            t1[i] += u1 * v;
        }
    }
    const T each = T(2.0 / double(k.pixels)) * static_cast<const T*>(k.grad)[n];
    for (int64_t i = 0; i < size; ++i) t0[i] *= each * i0[i], t1[i] *= each * i1[i];
    for (int64_t i = 0; i < size; ++i) i0[i] = each * a0[i], i1[i] = each * a1[i];
    T* __restrict out0 = static_cast<T*>(k.out0) + offset;
    T* __restrict out1 = k.out1 == nullptr ? nullptr : static_cast<T*>(k.out1) + offset;
    for (int64_t c = 0; c < k.c; ++c) {
        const int64_t at = c * k.pixels;
        const T *x0 = f0 + at, *x1 = f1 + at, w = weight[c];
        T* __restrict y0 = out0 + at;
        if (out1 == nullptr) {
            for (int64_t i = 0; i < size; ++i) {
                const T u0 = x0[i] * a0[i], v = w * (u0 - x1[i] * a1[i]);
                y0[i] = i0[i] * v - u0 * t0[i];
            }
        } else {
            T* __restrict y1 = out1 + at;
            for (int64_t i = 0; i < size; ++i) {
                const T u0 = x0[i] * a0[i], u1 = x1[i] * a1[i], v = w * (u0 - u1);
                y0[i] = i0[i] * v - u0 * t0[i];
                y1[i] = u1 * t1[i] - i1[i] * v;
            }
        }
    }
    return 0;
}

template <class T>
struct Lanes {
    static constexpr int count = VEC_BYTES / sizeof(T);
    typedef T V __attribute__((vector_size(VEC_BYTES)));

    static inline V load(const T* p, int64_t left) {
        V v{};
        if (left >= count)
            std::memcpy(&v, p, sizeof v);
        else
            for (int64_t l = 0; l < left; ++l) v[l] = p[l];
        return v;
    }
    static inline void store(T* p, V v, int64_t left) {
        if (left >= count)
            std::memcpy(p, &v, sizeof v);
        else
            for (int64_t l = 0; l < left; ++l) p[l] = v[l];
    }
    static inline T sum(V v) {
        T lanes[count];
        std::memcpy(lanes, &v, sizeof v);
        for (int half = count / 2; half > 0; half /= 2)
            for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
        return lanes[0];
    }
};

// Channels last: a pixel's channels stay in the first-level cache.
template <class T>
static double pixels_last(const LpipsLayer& k, int64_t n, int64_t first, int64_t size) {
    using L = Lanes<T>;
    using V = typename L::V;
    const T* weight = static_cast<const T*>(k.weight);
    const T eps = T(k.eps);
    double total = 0;
    for (int64_t i = 0; i < size; ++i) {
        const int64_t offset = (n * k.pixels + first + i) * k.c;
        const T *x0 = static_cast<const T*>(k.f0) + offset, *x1 = static_cast<const T*>(k.f1) + offset;
        V s0{}, s1{};
        for (int64_t c = 0; c < k.c; c += L::count) {
            const V v0 = L::load(x0 + c, k.c - c), v1 = L::load(x1 + c, k.c - c);
            s0 += v0 * v0, s1 += v1 * v1;
        }
        T a0, a1, i0, i1;
        normalise(L::sum(s0), eps, k.inside, a0, i0);
        normalise(L::sum(s1), eps, k.inside, a1, i1);
        s0 = s1 = V{};
        if (k.value != nullptr) {
            for (int64_t c = 0; c < k.c; c += L::count) {
                const V d = L::load(x0 + c, k.c - c) * a0 - L::load(x1 + c, k.c - c) * a1;
                s0 += L::load(weight + c, k.c - c) * d * d;
            }
            total += double(L::sum(s0));
            continue;
        }
        for (int64_t c = 0; c < k.c; c += L::count) {
            const V u0 = L::load(x0 + c, k.c - c) * a0, u1 = L::load(x1 + c, k.c - c) * a1;
            const V v = L::load(weight + c, k.c - c) * (u0 - u1);
            s0 += u0 * v, s1 += u1 * v;
        }
        const T each = T(2.0 / double(k.pixels)) * static_cast<const T*>(k.grad)[n];
        const T t0 = L::sum(s0) * (each * i0), t1 = L::sum(s1) * (each * i1), b0 = each * a0, b1 = each * a1;
        T* out0 = static_cast<T*>(k.out0) + offset;
        T* out1 = k.out1 == nullptr ? nullptr : static_cast<T*>(k.out1) + offset;
        for (int64_t c = 0; c < k.c; c += L::count) {
            const V u0 = L::load(x0 + c, k.c - c) * a0, u1 = L::load(x1 + c, k.c - c) * a1;
            const V v = L::load(weight + c, k.c - c) * (u0 - u1);
            L::store(out0 + c, v * b0 - u0 * t0, k.c - c);
            if (out1 != nullptr) L::store(out1 + c, u1 * t1 - v * b1, k.c - c);
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
        Block<T> scratch(k.last ? 0 : size);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < k.n * blocks; ++task) {
            const int64_t n = task / blocks, first = task % blocks * size, count = std::min(size, k.pixels - first);
            partial[size_t(task)] = k.last ? pixels_last<T>(k, n, first, count) : planes<T>(k, n, first, count, scratch);
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
