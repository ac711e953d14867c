// One pass over all pairs of the pooled points Z = [X; Y], cut into tiles. A task is a pair of tiles: distances by a
// register-blocked product, kernel value k and slope w = −dk/du for each pair, then w's products with both tiles for the
// gradients. Each unordered pair is visited once: XX and YY cost half of their square.
//
// Tasks run in rounds of a round-robin tournament: within a round no two tasks share a tile, so that every tile's sums
// are made by one thread at a time and in the same order for any number of threads, without a copy for each thread.
//
// Units: u = d²/base, with the coordinates centred on the common mean and divided by √base, so that the product of two
// rows plus their −½‖z‖² is −u/2; or the sum of their squared differences u; or, not centred, their product u.

#include "mmd_kernels.inl"

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

constexpr int strip_rows = VEC_BYTES == 64 ? 8 : 4;  // rows of the register block; its columns are two vectors

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

template <class T, class Z, int count, int width>
void gather_columns(const T* w, int64_t step_a, int64_t step_b, int64_t count_a, int64_t terms, const T* z,
                           T* g, int64_t stride, T scale) {
    for (int64_t a = 0; a < count_a; a += count)
        weighted_sums<T, Z, count, width>(w + a * step_a, step_a, step_b, terms, z, g + a * stride, stride, scale);
}

// Rows a take Σ_b w z_b; `count_a` is a multiple of a strip's rows. Enough sums at once to hide an addition's latency.
template <class T>
void gather(const T* w, int64_t step_a, int64_t step_b, int64_t count_a, int64_t terms, const T* z, T* g, int64_t stride,
            T scale) {
    using V = Vec<T>;
    constexpr int lanes = Lanes<T>::count;
    constexpr bool wide = VEC_BYTES == 64;
    if (stride < lanes)
        return gather_columns<T, typename Lanes<T>::Half, strip_rows, 1>(w, step_a, step_b, count_a, terms, z, g, stride,
                                                                 scale);
    for (int64_t c = 0; c < stride;) {
        const int64_t left = (stride - c) / lanes;
        if (wide && left >= 4) {
            gather_columns<T, V, 4, wide ? 4 : 1>(w, step_a, step_b, count_a, terms, z + c, g + c, stride, scale);
            c += 4 * lanes;
        } else if (left >= 2) {
            gather_columns<T, V, strip_rows, 2>(w, step_a, step_b, count_a, terms, z + c, g + c, stride, scale);
            c += 2 * lanes;
        } else {
            gather_columns<T, V, strip_rows, 1>(w, step_a, step_b, count_a, terms, z + c, g + c, stride, scale);
            c += lanes;
        }
    }
}

template <class T, class Kernel>
struct Pairs {
    using V = Vec<T>;
    using I = typename Lanes<T>::I;
    static constexpr int lanes = Lanes<T>::count;
    static constexpr int strip = strip_rows;
    static constexpr int panel = 2 * lanes;
    static constexpr int largest = 128;  // rows of a tile
    static constexpr int kept = 4096;    // slopes, of as many whole rows, before the gradients' products
    static constexpr Metric metric = Kernel::metric;
    static constexpr T no_pair = metric == direct ? far<T> : -far<T>;  // what a sweep's sum is for a pair that is none

    const MmdArguments<T>& arguments;
    const Kernel kernel;
    const int64_t d, stride, tile, tiles_x, tiles_y;
    const bool exclude_same, exclude_cross, weighted;
    Buffer<T> rows, panels, half, weights;  // z by rows and in panels of columns, −½‖z‖², the points' weights
    Buffer<T> gradient, slopes;             // Σ w z, Σ w
    std::vector<double> sums;               // of each tile
    double coefficient[3], pull[3], unit;   // of XX, YY, XY: in the value, and in the gradient relative to one of them

    static int64_t tile_rows(int64_t points, int64_t d) {
        // Large tiles are fetched less often for each pair; a panel of columns stays in the second-level cache, and few
        // points still make many tasks.
        return points <= 1024 || d > 2048 ? 64 : 128;
    }

    Pairs(const MmdArguments<T>& arguments_)
        : arguments(arguments_),
          kernel(arguments_.parameters),
          d(arguments_.d),
          stride(arguments_.d <= lanes / 2 ? lanes / 2 : (arguments_.d + lanes - 1) / lanes * lanes),
          tile(tile_rows(arguments_.n + arguments_.m, arguments_.d)),
          tiles_x((arguments_.n + tile - 1) / tile),
          tiles_y((arguments_.m + tile - 1) / tile),
          exclude_same(metric != inner || arguments_.estimator != 1),
          exclude_cross(arguments_.estimator == 2),
          weighted(arguments_.x_weight != nullptr),
          rows((tiles_x + tiles_y) * tile * stride),
          panels((tiles_x + tiles_y) * tile * d),
          half((tiles_x + tiles_y) * tile),
          weights(weighted ? (tiles_x + tiles_y) * tile : 0),
          gradient(arguments_.gx ? (tiles_x + (arguments_.gy ? tiles_y : 0)) * tile * stride : 0),
          slopes((tiles_x + tiles_y) * tile),
          sums(tiles_x + tiles_y) {}

    void set_coefficients(int64_t item) {
        const double n = double(arguments.n), m = double(arguments.m);
        const bool biased = arguments.estimator == 1;
        coefficient[0] = 1 / (n * (biased ? n : n - 1));
        coefficient[1] = 1 / (m * (biased ? m : m - 1));
        coefficient[2] = 1 / (n * (exclude_cross ? n - 1 : m));
        if (arguments.coefficients != nullptr)
            std::copy_n(arguments.coefficients + (arguments.coefficients_batched ? 3 * item : 0), 3, coefficient);
        unit = coefficient[arguments.terms & 4 ? 2 : arguments.terms & 1 ? 0 : 1];
        coefficient[2] = -coefficient[2];
        for (int i = 0; i < 3; ++i) pull[i] = coefficient[i] / unit;
    }

    int64_t points(int64_t t) const {
        return t < tiles_x ? std::min(tile, arguments.n - t * tile) : std::min(tile, arguments.m - (t - tiles_x) * tile);
    }

    bool wants_gradient(int64_t t) const { return t < tiles_x ? arguments.gx != nullptr : arguments.gy != nullptr; }

    // A tile's points, centred and scaled. Padding is zero, and infinitely far away; so that nothing else is taken for it,
    // points that far out become NaN where the kernel would not vanish there.
    void pack(int64_t t, int64_t item, const double* centre, double scale) {
        const T* source = points_of(item, t);
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
            h[i] = i >= count ? no_pair : metric == expanded ? T(norm * -0.5) : T(0);
            if (!Kernel::vanishes && i < count && !(norm < none<T> / 4)) h[i] = std::numeric_limits<T>::quiet_NaN();
        }
        if (weighted) {
            const T* w = t < tiles_x ? arguments.x_weight + (arguments.x_weight_batched ? item * arguments.n : 0) + t * tile
                                     : arguments.y_weight + (arguments.y_weight_batched ? item * arguments.m : 0) +
                                           (t - tiles_x) * tile;
            for (int64_t i = 0; i < tile; ++i) weights.data[t * tile + i] = i < count ? w[i] : T(0);
        }
        for (int64_t block = 0; block < tile; block += panel)
            for (int64_t c = 0; c < d; ++c)
                for (int64_t l = 0; l < panel; ++l) p[block * d + c * panel + l] = z[(block + l) * stride + c];
        if (wants_gradient(t)) std::memset(gradient.data + t * tile * stride, 0, tile * stride * sizeof(T));
        std::memset(slopes.data + t * tile, 0, tile * sizeof(T));
        sums[t] = 0;
    }

    // `strip` rows from i against all columns of tile b: the sum of the kernel, and where asked the slopes into w.
    template <bool slope, bool weighing>
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
                    if constexpr (metric == direct) {
                        const V d0 = p0 - s, d1 = p1 - s;
                        u[r][0] += d0 * d0;
                        u[r][1] += d1 * d1;
                    } else {
                        u[r][0] += p0 * s;
                        u[r][1] += p1 * s;
                    }
                }
            }
            if (diagonal && j < i + strip && i < j + panel) {
                I lane;
                for (int l = 0; l < lanes; ++l) lane[l] = l;
                for (int r = 0; r < strip; ++r) {
                    u[r][0] = lane == decltype(lane[0] + 0)(i + r - j) ? splat<T>(no_pair) : u[r][0];
                    u[r][1] = lane == decltype(lane[0] + 0)(i + r - j - lanes) ? splat<T>(no_pair) : u[r][1];
                }
            }
            for (int r = 0; r < strip; ++r)
                for (int v = 0; v < 2; ++v) {
                    V weight, distance = u[r][v];
                    if constexpr (metric == expanded) distance = (distance > T(0) ? V{} : distance) * T(-2);  // NaN stays
                    V k = kernel.template operator()<slope>(distance, weight);
                    if constexpr (weighing) {
                        const T* own = weights.data + a * tile + i + r;
                        const V both = *(const V*)(weights.data + b * tile + j + v * lanes) * *own;
                        k *= both;
                        if constexpr (slope) weight *= both;
                    }
                    total += k;
                    if constexpr (slope) {
                        *(V*)(w + r * tile + j + v * lanes) = weight;
                        row_slopes[r] += weight;
                        column_slopes[j / lanes + v] += weight;
                    }
                }
        }
        if constexpr (slope)
            for (int r = 0; r < strip; ++r) slopes.data[a * tile + i + r] += pulled * T(lane_sum<T>(row_slopes[r]));
        return lane_sum<T>(total);
    }

    template <bool weighing>
    void task_of(int64_t a, int64_t b) {
        if (wants_gradient(b) && !wants_gradient(a)) std::swap(a, b);
        const bool same = (a < tiles_x) == (b < tiles_x), for_a = wants_gradient(a);
        const int which = !same ? 2 : a < tiles_x ? 0 : 1;
        if ((arguments.terms >> which & 1) == 0) return;
        const bool for_b = a != b && wants_gradient(b);
        const bool diagonal = (a == b && exclude_same) ||
                              (exclude_cross && std::max(a, b) - std::min(a, b) == tiles_x && !same);
        const T pulled = T(pull[which]);
        const int64_t count_a = points(a), count_b = points(b), columns = (count_b + panel - 1) / panel * panel;
        double total = 0;
        if (!for_a) {
            for (int64_t i = 0; i < count_a; i += strip)
                total += sweep<false, weighing>(a, b, i, columns, diagonal, nullptr, nullptr, pulled);
        } else {
            alignas(64) T w[kept];
            const int64_t group = std::min(tile, kept / tile);
            V column_slopes[largest / lanes] = {};
            for (int64_t i = 0; i < count_a; i += group) {
                const int64_t filled = (std::min<int64_t>(group, count_a - i) + strip - 1) / strip * strip;
                for (int64_t r = 0; r < filled; r += strip)
                    total += sweep<true, weighing>(a, b, i + r, columns, diagonal, w + r * tile, column_slopes, pulled);
                T* ga = gradient.data + (a * tile + i) * stride;
                gather<T>(w, tile, 1, filled, columns, rows.data + b * tile * stride, ga, stride, pulled);
                if (for_b) {
                    T* gb = gradient.data + b * tile * stride;
                    gather<T>(w, 1, tile, columns, filled, rows.data + (a * tile + i) * stride, gb, stride, pulled);
                }
            }
            if (for_b)
                for (int64_t j = 0; j < columns; ++j)
                    slopes.data[b * tile + j] += pulled * column_slopes[j / lanes][j % lanes];
        }
        sums[a] += total * coefficient[which] * (a == b ? 1 : 2);  // a tile against itself meets each pair twice
    }

    void task(int64_t a, int64_t b) { weighted ? task_of<true>(a, b) : task_of<false>(a, b); }

    void finish(int64_t t, T* out, double scale) const {
        const T* z = rows.data + t * tile * stride;
        const T* g = gradient.data + t * tile * stride;
        for (int64_t i = 0; i < points(t); ++i) {
            const T s = metric == inner ? T(0) : slopes.data[t * tile + i];
            for (int64_t c = 0; c < d; ++c) out[i * d + c] = T(scale * (g[i * stride + c] - s * z[i * stride + c]));
        }
    }

    const T* points_of(int64_t item, int64_t t) const {
        return t < tiles_x ? arguments.x + (item * arguments.n + t * tile) * d
                           : arguments.y + (item * arguments.m + (t - tiles_x) * tile) * d;
    }

    void run(int64_t item, int threads) {
        const int64_t tiles = tiles_x + tiles_y, seats = tiles + tiles % 2, rounds = seats - 1;
        std::vector<double> centre(d), partial(tiles * d);
        const double scale = 1 / std::sqrt(kernel.base);
        set_coefficients(item);
        // d/dz_i of coefficient · Σ k: twice for the two orders of a pair, twice for a square's own derivative.
        const double out_scale = (metric == inner ? 2 : 4) * unit * scale;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; ++t)
                for (int64_t i = 0; i < points(t); ++i)
                    for (int64_t c = 0; c < d; ++c) partial[t * d + c] += points_of(item, t)[i * d + c];
#pragma omp single
            for (int64_t c = 0; c < d; ++c) {
                for (int64_t t = 0; t < tiles && metric != inner; ++t) centre[c] += partial[t * d + c];
                centre[c] /= double(arguments.n + arguments.m);
            }
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; ++t) pack(t, item, centre.data(), scale);
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
        if (arguments.estimator == 1 && kernel.at_zero() != 0) {
            // The diagonal's pairs were left out above: their distance is exactly zero.
            double squares[2] = {double(arguments.n), double(arguments.m)};
            if (weighted) {
                squares[0] = squares[1] = 0;
                for (int64_t t = 0; t < tiles; ++t)
                    for (int64_t i = 0; i < tile; ++i)
                        squares[t >= tiles_x] += double(weights.data[t * tile + i]) * weights.data[t * tile + i];
            }
            for (int side = 0; side < 2; ++side)
                if (arguments.terms >> side & 1) value += kernel.at_zero() * coefficient[side] * squares[side];
        }
        arguments.value[item] = T(value);
    }
};

template <class T, class Kernel>
void mmd_kernel(const MmdArguments<T>& arguments) {
    if (arguments.batch < arguments.threads || arguments.batch == 1) {
        Pairs<T, Kernel> pairs(arguments);
        // Tens of microseconds of work are not worth waking a thread for.
        const double points = double(arguments.n + arguments.m), work = points * points * double(arguments.d + 16);
        const int threads = work < 4e6 ? 1 : arguments.threads;
        for (int64_t item = 0; item < arguments.batch; ++item) pairs.run(item, threads);
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
    if (arguments.kind == "laplacian") return mmd_kernel<T, Laplacian<T>>(arguments);
    if (arguments.kind == "energy") return mmd_kernel<T, Energy<T>>(arguments);
    if (arguments.kind == "rational_quadratic") return mmd_kernel<T, RationalQuadratic<T>>(arguments);
    if (arguments.kind == "polynomial") return mmd_kernel<T, Polynomial<T>>(arguments);
    throw std::invalid_argument("mmd: no such kernel: " + arguments.kind);
}

#undef FASTGEN_INLINE
