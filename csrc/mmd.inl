// One pass over all pairs of the pooled points Z = [X; Y], cut into tiles. A task is a pair of tiles: distances by a
// register-blocked product, kernel value k and slope w = −dk/du for each pair, then w's products with both tiles for the
// gradients. Each unordered pair is visited once: XX and YY cost half of their square.
//
// Tasks run in rounds of a round-robin tournament: within a round no two tasks share a tile, so that every tile's sums
// are made by one thread at a time and in the same order for any number of threads, without a copy for each thread.
//
// Units: u = d²/base, with the coordinates centred on the common mean and divided by √base, so that the product of two
// rows plus their −½‖z‖² is −u/2.

#define FASTGEN_INLINE inline __attribute__((always_inline))

template <class T>
struct Lanes {
    static constexpr int count = VEC_BYTES / sizeof(T);
    using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef T V __attribute__((vector_size(VEC_BYTES)));
    typedef T Half __attribute__((vector_size(VEC_BYTES / 2)));
    typedef Int I __attribute__((vector_size(VEC_BYTES)));
};

template <class T>
using Vec = typename Lanes<T>::V;

template <class T>
FASTGEN_INLINE Vec<T> splat(T s) {
    return Vec<T>{} + s;
}

template <class T>
FASTGEN_INLINE double lane_sum(Vec<T> v) {
    typename Lanes<T>::Half low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    low += high;
    T sum = 0;
    for (int l = 0; l < Lanes<T>::count / 2; ++l) sum += low[l];
    return double(sum);
}

// 1/x for x ≥ 1.
template <class T>
FASTGEN_INLINE Vec<T> reciprocal(Vec<T> x) {
#if VEC_BYTES == 64
    if constexpr (std::is_same_v<T, float>) {
        // 14 bits and one Newton step: within one unit in the last place, at a third of a division's time.
        const Vec<T> r = (Vec<T>)__builtin_ia32_rcp14ps512_mask((Vec<float>)x, Vec<float>{}, (unsigned short)-1);
        return r + r * (T(1) - x * r);
    }
#endif
    return T(1) / x;
}

// exp(x) for x ≤ 0: 2^n · e^r with |r| ≤ ½ ln 2 and Taylor's polynomial for e^r. NaN stays NaN, an underflow is 0.
template <class T>
FASTGEN_INLINE Vec<T> exp_negative(Vec<T> x) {
    using I = typename Lanes<T>::I;
    constexpr bool single = std::is_same_v<T, float>;
    constexpr int mantissa = single ? 23 : 52, bias = single ? 127 : 1023, terms = single ? 7 : 13;
    constexpr T magic = single ? T(12582912.0) : T(6755399441055744.0);  // 1.5 · 2^mantissa: adding it rounds
    constexpr T ln2_high = single ? T(0.693359375) : T(6.93147180369123816490e-01);
    constexpr T ln2_low = single ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
    constexpr T least = single ? T(-87.0) : T(-708.0);
    const Vec<T> shifted = x * T(1.4426950408889634) + magic;
    const Vec<T> n = shifted - magic;
    const Vec<T> r = (x - n * ln2_high) - n * ln2_low;
    T factorial = 1;
    T coefficient[terms + 1];
    for (int i = 0; i <= terms; ++i) {
        coefficient[i] = T(1) / factorial;
        factorial *= T(i + 1);
    }
    Vec<T> p = splat<T>(coefficient[terms]);
    for (int i = terms - 1; i >= 0; --i) p = p * r + coefficient[i];
    const I exponent = ((I)shifted - (I)splat<T>(magic) + bias) << mantissa;
    const Vec<T> e = p * (Vec<T>)exponent;
    return x < least ? Vec<T>{} : e;
}

// The seven scales {s, 1} ∪ {1/s}, in pairs: with v = 1/(1 + u), z = v − v² and b = (1 − s)²/s,
//   k = v + Σ_b (2v + bz)/(1 + bz),   −dk/du = v² (1 + 2R + (1 − 4z)S),   R = Σ 1/(1 + bz),   S = Σ b/(1 + bz)².
// Every coefficient is positive and z ≤ ¼: right at any u. The three reciprocals of 1 + bz come out of one.
template <class T>
struct ImqPairs {
    T b1, b2, b3;
    double base;

    explicit ImqPairs(const std::vector<double>& p)
        : b1(T(p.at(1))), b2(T(p.at(2))), b3(T(p.at(3))), base(p.at(0)) {}
    double at_zero() const { return 7; }

    template <bool slope>
    FASTGEN_INLINE Vec<T> operator()(Vec<T> u, Vec<T>& w) const {
        const Vec<T> v = reciprocal<T>(u + T(1));
        const Vec<T> vv = v * v, z = v - vv;
        const Vec<T> q1 = z * b1 + T(1), q2 = z * b2 + T(1), q3 = z * b3 + T(1);
        const Vec<T> q12 = q1 * q2, r = reciprocal<T>(q12 * q3), r3 = r * q3;
        const Vec<T> i1 = r3 * q2, i2 = r3 * q1, i3 = r * q12;
        const Vec<T> g = (i1 + i2 + i3) * T(2) + T(1);
        const Vec<T> j1 = i1 * b1, j2 = i2 * b2, j3 = i3 * b3;
        if constexpr (slope) {
            const Vec<T> s = j1 * i1 + j2 * i2 + j3 * i3;
            w = vv * ((T(1) - z * T(4)) * s + g);
        }
        return v * g + z * (j1 + j2 + j3);
    }
};

// Any scales: Σ q, q = 1/(1 + u·a), slope Σ a q², where a = base/c.
template <class T>
struct ImqSum {
    std::vector<T> a;
    double base;

    explicit ImqSum(const std::vector<double>& p) : base(p[p.size() / 2]) {
        for (double c : p) a.push_back(T(base / c));
    }
    double at_zero() const { return double(a.size()); }

    template <bool slope>
    FASTGEN_INLINE Vec<T> operator()(Vec<T> u, Vec<T>& w) const {
        Vec<T> k{}, total{};
        for (const T factor : a) {
            const Vec<T> q = reciprocal<T>(u * factor + T(1));
            k += q;
            if constexpr (slope) total += q * q * factor;
        }
        if constexpr (slope) w = total;
        return k;
    }
};

template <class T>
struct Rbf {
    std::vector<T> rate;
    double base;

    explicit Rbf(const std::vector<double>& p) : base(1 / p[p.size() / 2]) {
        for (double g : p) rate.push_back(T(g * base));
    }
    double at_zero() const { return double(rate.size()); }

    template <bool slope>
    FASTGEN_INLINE Vec<T> operator()(Vec<T> u, Vec<T>& w) const {
        Vec<T> k{}, total{};
        for (const T g : rate) {
            const Vec<T> e = exp_negative<T>(u * -g);
            k += e;
            if constexpr (slope) total += e * g;
        }
        if constexpr (slope) w = total;
        return k;
    }
};

template <class T>
struct Buffer {
    T* data;
    explicit Buffer(int64_t count)
        : data(static_cast<T*>(std::aligned_alloc(64, (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64))) {
        if (data == nullptr) throw std::bad_alloc();
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

// G[a][:] += scale · Σ_b w(a, b) Z[b][:] for `count` rows a and `width` vectors V; w(a, b) = w[a·step_a + b·step_b].
template <class T, class V, int count, int width>
FASTGEN_INLINE void weighted_sums(const T* w, int64_t step_a, int64_t step_b, int64_t terms, const T* z, T* g,
                                  int64_t stride, T scale) {
    constexpr int lanes = sizeof(V) / sizeof(T);
    V sums[count][width] = {};
    for (int64_t b = 0; b < terms; ++b) {
        V points[width];
        for (int v = 0; v < width; ++v) points[v] = *(const V*)(z + b * stride + v * lanes);
        for (int a = 0; a < count; ++a) {
            const T factor = w[a * step_a + b * step_b];
            for (int v = 0; v < width; ++v) sums[a][v] += points[v] * factor;
        }
    }
    for (int a = 0; a < count; ++a)
        for (int v = 0; v < width; ++v) {
            V* out = (V*)(g + a * stride + v * lanes);
            *out += sums[a][v] * scale;
        }
}

template <class T, class Kernel>
struct Pairs {
    using V = Vec<T>;
    using I = typename Lanes<T>::I;
    static constexpr int lanes = Lanes<T>::count;
    static constexpr int strip = VEC_BYTES == 64 ? 8 : 4;  // rows of the register block; its columns are two vectors
    static constexpr int panel = 2 * lanes;
    static constexpr int group = 32;     // rows whose slopes are kept before the gradients' products
    static constexpr int largest = 128;  // rows of a tile
    static constexpr T far = sizeof(T) == 4 ? T(1e35) : T(1e300);  // −½‖z‖² of no point at all

    const MmdArguments<T>& arguments;
    const Kernel kernel;
    const int64_t d, stride, tile, tiles_x, tiles_y;
    const bool exclude_cross;
    Buffer<T> rows, panels, half, gradient, slopes;  // z by rows and in panels of columns, −½‖z‖², Σ w z, Σ w
    std::vector<double> sums;                        // of each tile
    double coefficient[3], pull[3];                  // of XX, YY, XY: in the value, and in the gradient relative to XY

    static int64_t tile_rows(int64_t points, int64_t d) {
        // Two tiles, their panels and their gradients stay in the second-level cache; few points still make many tasks.
        if (d > 256 || points <= 256) return 32;
        return d > 128 || points <= 1024 ? 64 : 128;
    }

    Pairs(const MmdArguments<T>& arguments_)
        : arguments(arguments_),
          kernel(arguments_.parameters),
          d(arguments_.d),
          stride(arguments_.d <= lanes / 2 ? lanes / 2 : (arguments_.d + lanes - 1) / lanes * lanes),
          tile(tile_rows(arguments_.n + arguments_.m, arguments_.d)),
          tiles_x((arguments_.n + tile - 1) / tile),
          tiles_y((arguments_.m + tile - 1) / tile),
          exclude_cross(arguments_.estimator == 2),
          rows((tiles_x + tiles_y) * tile * stride),
          panels((tiles_x + tiles_y) * tile * d),
          half((tiles_x + tiles_y) * tile),
          gradient(arguments_.gx ? (tiles_x + (arguments_.gy ? tiles_y : 0)) * tile * stride : 0),
          slopes((tiles_x + tiles_y) * tile),
          sums(tiles_x + tiles_y) {
        const double n = double(arguments.n), m = double(arguments.m);
        const bool biased = arguments.estimator == 1;
        coefficient[0] = 1 / (n * (biased ? n : n - 1));
        coefficient[1] = 1 / (m * (biased ? m : m - 1));
        coefficient[2] = -1 / (n * (exclude_cross ? n - 1 : m));
        for (int i = 0; i < 3; ++i) pull[i] = coefficient[i] / -coefficient[2];
    }

    int64_t points(int64_t t) const {
        return t < tiles_x ? std::min(tile, arguments.n - t * tile) : std::min(tile, arguments.m - (t - tiles_x) * tile);
    }

    bool wants_gradient(int64_t t) const { return t < tiles_x ? arguments.gx != nullptr : arguments.gy != nullptr; }

    // A tile's points, centred and scaled. Padding is zero, and infinitely far away.
    void pack(int64_t t, const T* source, const double* centre, double scale) {
        T* z = rows.data + t * tile * stride;
        T* h = half.data + t * tile;
        T* p = panels.data + t * tile * d;
        const int64_t count = points(t);
        std::memset(z, 0, tile * stride * sizeof(T));
        for (int64_t i = 0; i < tile; ++i) {
            double norm = 0;
            for (int64_t c = 0; i < count && c < d; ++c) {
                const T value = T((source[i * d + c] - centre[c]) * scale);
                z[i * stride + c] = value;
                norm += double(value) * double(value);
            }
            h[i] = i < count ? T(norm * -0.5) : -far;
        }
        for (int64_t block = 0; block < tile; block += panel)
            for (int64_t c = 0; c < d; ++c)
                for (int64_t l = 0; l < panel; ++l) p[block * d + c * panel + l] = z[(block + l) * stride + c];
        if (wants_gradient(t)) std::memset(gradient.data + t * tile * stride, 0, tile * stride * sizeof(T));
        std::memset(slopes.data + t * tile, 0, tile * sizeof(T));
        sums[t] = 0;
    }

    // `strip` rows from i against all columns of tile b: the sum of the kernel, and where asked the slopes into w.
    template <bool slope>
    __attribute__((noinline)) double sweep(int64_t a, int64_t b, int64_t i, int64_t columns, bool diagonal, T* w,
                                           V* column_slopes, T pulled) const {
        V total{};
        V row_slopes[strip] = {};
        const T* z = rows.data + (a * tile + i) * stride;
        const T* h = half.data + a * tile + i;
        for (int64_t j = 0; j < columns; j += panel) {
            const T* p = panels.data + (b * tile + j) * d;
            V u[strip][2];
            const V h0 = *(const V*)(half.data + b * tile + j), h1 = *(const V*)(half.data + b * tile + j + lanes);
            for (int r = 0; r < strip; ++r) {
                u[r][0] = h0 + h[r];
                u[r][1] = h1 + h[r];
            }
            for (int64_t c = 0; c < d; ++c) {
                const V p0 = *(const V*)(p + c * panel), p1 = *(const V*)(p + c * panel + lanes);
                for (int r = 0; r < strip; ++r) {
                    const T s = z[r * stride + c];
                    u[r][0] += p0 * s;
                    u[r][1] += p1 * s;
                }
            }
            if (diagonal && j < i + strip && i < j + panel) {
                I lane;
                for (int l = 0; l < lanes; ++l) lane[l] = l;
                for (int r = 0; r < strip; ++r) {
                    u[r][0] = lane == decltype(lane[0] + 0)(i + r - j) ? splat<T>(-far) : u[r][0];
                    u[r][1] = lane == decltype(lane[0] + 0)(i + r - j - lanes) ? splat<T>(-far) : u[r][1];
                }
            }
            for (int r = 0; r < strip; ++r)
                for (int v = 0; v < 2; ++v) {
                    const V negative = u[r][v] > T(0) ? V{} : u[r][v];  // a NaN is not above zero
                    V weight;
                    total += kernel.template operator()<slope>(negative * T(-2), weight);
                    if constexpr (slope) {
                        *(V*)(w + r * largest + j + v * lanes) = weight;
                        row_slopes[r] += weight;
                        column_slopes[j / lanes + v] += weight;
                    }
                }
        }
        if constexpr (slope)
            for (int r = 0; r < strip; ++r) slopes.data[a * tile + i + r] += pulled * T(lane_sum<T>(row_slopes[r]));
        return lane_sum<T>(total);
    }

    template <class Z, int count, int width>
    static void gather_columns(const T* w, int64_t step_a, int64_t step_b, int64_t count_a, int64_t terms, const T* z,
                               T* g, int64_t stride, T scale) {
        for (int64_t a = 0; a < count_a; a += count)
            weighted_sums<T, Z, count, width>(w + a * step_a, step_a, step_b, terms, z, g + a * stride, stride, scale);
    }

    // Rows a take Σ_b w z_b; `count_a` is a multiple of `strip`. Enough sums at once to hide an addition's latency.
    void gather(const T* w, int64_t step_a, int64_t step_b, int64_t count_a, int64_t terms, const T* z, T* g,
                T scale) const {
        constexpr bool wide = VEC_BYTES == 64;
        if (stride < lanes)
            return gather_columns<typename Lanes<T>::Half, strip, 1>(w, step_a, step_b, count_a, terms, z, g, stride,
                                                                     scale);
        for (int64_t c = 0; c < stride;) {
            const int64_t left = (stride - c) / lanes;
            if (wide && left >= 4) {
                gather_columns<V, 4, wide ? 4 : 1>(w, step_a, step_b, count_a, terms, z + c, g + c, stride, scale);
                c += 4 * lanes;
            } else if (left >= 2) {
                gather_columns<V, strip, 2>(w, step_a, step_b, count_a, terms, z + c, g + c, stride, scale);
                c += 2 * lanes;
            } else {
                gather_columns<V, strip, 1>(w, step_a, step_b, count_a, terms, z + c, g + c, stride, scale);
                c += lanes;
            }
        }
    }

    void task(int64_t a, int64_t b) {
        if (wants_gradient(b) && !wants_gradient(a)) std::swap(a, b);
        const bool same = (a < tiles_x) == (b < tiles_x), for_a = wants_gradient(a);
        const bool for_b = a != b && wants_gradient(b);
        const bool diagonal = a == b || (exclude_cross && std::max(a, b) - std::min(a, b) == tiles_x && !same);
        const int which = !same ? 2 : a < tiles_x ? 0 : 1;
        const T pulled = T(pull[which]);
        const int64_t count_a = points(a), count_b = points(b), columns = (count_b + panel - 1) / panel * panel;
        double total = 0;
        if (!for_a) {
            for (int64_t i = 0; i < count_a; i += strip)
                total += sweep<false>(a, b, i, columns, diagonal, nullptr, nullptr, pulled);
        } else {
            alignas(64) T w[group * largest];
            V column_slopes[largest / lanes] = {};
            for (int64_t i = 0; i < count_a; i += group) {
                const int64_t filled = (std::min<int64_t>(group, count_a - i) + strip - 1) / strip * strip;
                for (int64_t r = 0; r < filled; r += strip)
                    total += sweep<true>(a, b, i + r, columns, diagonal, w + r * largest, column_slopes, pulled);
                T* ga = gradient.data + (a * tile + i) * stride;
                gather(w, largest, 1, filled, columns, rows.data + b * tile * stride, ga, pulled);
                if (for_b) {
                    T* gb = gradient.data + b * tile * stride;
                    gather(w, 1, largest, columns, filled, rows.data + (a * tile + i) * stride, gb, pulled);
                }
            }
            if (for_b)
                for (int64_t j = 0; j < columns; ++j)
                    slopes.data[b * tile + j] += pulled * column_slopes[j / lanes][j % lanes];
        }
        sums[a] += total * coefficient[which] * (a == b ? 1 : 2);  // a tile against itself meets each pair twice
    }

    void finish(int64_t t, T* out, double scale) const {
        const T* z = rows.data + t * tile * stride;
        const T* g = gradient.data + t * tile * stride;
        for (int64_t i = 0; i < points(t); ++i) {
            const T s = slopes.data[t * tile + i];
            for (int64_t c = 0; c < d; ++c) out[i * d + c] = T(scale * (g[i * stride + c] - s * z[i * stride + c]));
        }
    }

    const T* source(int64_t item, int64_t t) const {
        return t < tiles_x ? arguments.x + (item * arguments.n + t * tile) * d
                           : arguments.y + (item * arguments.m + (t - tiles_x) * tile) * d;
    }

    void run(int64_t item, int threads) {
        const int64_t tiles = tiles_x + tiles_y, seats = tiles + tiles % 2, rounds = seats - 1;
        std::vector<double> centre(d), partial(tiles * d);
        const double scale = 1 / std::sqrt(kernel.base);
        // d/dz_i of coefficient · Σ k: twice for the two orders of a pair, twice for u's own derivative, in y's units.
        const double out_scale = 4 * -coefficient[2] * scale;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; ++t)
                for (int64_t i = 0; i < points(t); ++i)
                    for (int64_t c = 0; c < d; ++c) partial[t * d + c] += source(item, t)[i * d + c];
#pragma omp single
            for (int64_t c = 0; c < d; ++c) {
                for (int64_t t = 0; t < tiles; ++t) centre[c] += partial[t * d + c];
                centre[c] /= double(arguments.n + arguments.m);
            }
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; ++t) pack(t, source(item, t), centre.data(), scale);
            for (int64_t round = 0; round < rounds; ++round) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t k = 0; k < seats / 2; ++k) {
                    const int64_t a = k == 0 ? rounds : (round + k) % rounds, b = (round - k + rounds) % rounds;
                    if (a < tiles && b < tiles) task(std::min(a, b), std::max(a, b));
                }
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t t = 0; t < tiles; ++t) {
                task(t, t);
                if (t < tiles_x && arguments.gx != nullptr)
                    finish(t, arguments.gx + (item * arguments.n + t * tile) * d, out_scale);
                else if (t >= tiles_x && arguments.gy != nullptr)
                    finish(t, arguments.gy + (item * arguments.m + (t - tiles_x) * tile) * d, out_scale);
            }
        }
        double value = 0;
        for (const double s : sums) value += s;
        if (arguments.estimator == 1)  // the diagonal's pairs were left out above: their distance is exactly zero
            value += kernel.at_zero() * (1 / double(arguments.n) + 1 / double(arguments.m));
        arguments.value[item] = T(value);
    }
};

template <class T, class Kernel>
void mmd_kernel(const MmdArguments<T>& arguments) {
    if (arguments.batch < arguments.threads || arguments.batch == 1) {
        Pairs<T, Kernel> pairs(arguments);
        for (int64_t item = 0; item < arguments.batch; ++item) pairs.run(item, arguments.threads);
        return;
    }
    std::vector<std::unique_ptr<Pairs<T, Kernel>>> own;  // made here: an exception must not leave a parallel region
    for (int t = 0; t < arguments.threads; ++t) own.push_back(std::make_unique<Pairs<T, Kernel>>(arguments));
#pragma omp parallel for num_threads(arguments.threads) schedule(static)
    for (int t = 0; t < arguments.threads; ++t)
        for (int64_t item = t; item < arguments.batch; item += arguments.threads) own[t]->run(item, 1);
}

template <class T>
void mmd_all(const MmdArguments<T>& arguments) {
    if (arguments.kind == "imq_pairs") return mmd_kernel<T, ImqPairs<T>>(arguments);
    if (arguments.kind == "imq") return mmd_kernel<T, ImqSum<T>>(arguments);
    if (arguments.kind == "rbf") return mmd_kernel<T, Rbf<T>>(arguments);
    throw std::invalid_argument("mmd: no such kernel: " + arguments.kind);
}

#undef FASTGEN_INLINE
