// One pass over all pairs of the pooled points Z = [X; Y], cut into tiles. A task is a pair of tiles: distances by a
// register-blocked product, kernel value k and slope w = −dk/du for each pair, then w's products with both tiles for the
// gradients. Each unordered pair is visited once: XX and YY cost half of their square.
//
// Tasks run in rounds of a round-robin tournament: within a round no two tasks share a tile, so that every tile's sums
// are made by one thread at a time and in the same order for any number of threads, without a copy for each thread.
//
// Units: u = d²/base, with the coordinates centred on the common mean and divided by √base, so that the product of two
// rows plus their −½‖z‖² is −u/2; or the sum of their squared differences u; or, not centred, their product u.
//
// The gradient is Σ_b w (z_b − z_a), the Hessian's product with directions v, in the same units,
//   Σ_b w (v_b − v_a) + e (z_b − z_a),   e = −2 d²k/du² ⟨z_a − z_b, v_a − v_b⟩;
// of inner products Σ_b w z_b, and Σ_b w v_b + e z_b with e = d²k/du² (⟨z_a, v_b⟩ + ⟨v_a, z_b⟩). So it is the gradient with
// two pairs of factors and points in place of one: `second` below.

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
void gather(const T* w, int64_t step_a, int64_t step_b, int64_t count_a, int64_t terms, const T* z, T* g, int64_t width,
            int64_t stride, T scale) {
    using V = Vec<T>;
    constexpr int lanes = Lanes<T>::count;
    constexpr bool wide = VEC_BYTES == 64;
    if (width < lanes)
        return gather_columns<T, typename Lanes<T>::Half, strip_rows, 1>(w, step_a, step_b, count_a, terms, z, g, stride,
                                                                 scale);
    for (int64_t c = 0; c < width;) {
        const int64_t left = (width - c) / lanes;
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

template <class T, class Kernel, bool second>
struct Pairs {
    using V = Vec<T>;
    using I = typename Lanes<T>::I;
    static constexpr int lanes = Lanes<T>::count;
    static constexpr int strip = strip_rows;
    static constexpr int panel = 2 * lanes;
    static constexpr int fields = second ? 2 : 1;     // of points: z, and the directions v
    static constexpr int gradients = second ? 2 : 1;  // the order of a sweep that makes them
    static constexpr int largest = 128;               // rows of a tile
    static constexpr int chunk = 256;                 // coordinates of a panel's products made at once
    static constexpr int kept = largest * largest;    // slopes of a task, before the gradients' products
    static constexpr Metric metric = Kernel::metric;
    static constexpr T no_pair = metric == direct ? far<T> : -far<T>;  // what a sweep's sum is for a pair that is none

    const MmdArguments<T>& arguments;
    const Kernel kernel;
    const int64_t d, width, stride, tile, tiles_x, tiles_y, tiles;
    const bool exclude_same, exclude_cross, weighted;
    Buffer<T> rows, panels;         // of each field: the points by rows and in panels of columns
    Buffer<T> half, along, weights;  // −½‖z‖², ⟨z, v⟩, the points' weights
    Buffer<T> gradient, slopes;     // Σ w z, Σ w; or Σ w v + e z, Σ w and Σ e
    std::vector<double> sums;               // of each tile
    double coefficient[3], pull[3], unit;   // of XX, YY, XY: in the value, and in the gradient relative to one of them

    static int64_t tile_rows(int64_t points) {
        // Large tiles are fetched less often for each pair, and few points still make many tasks.
        return points <= 512 ? 64 : 128;
    }

    Pairs(const MmdArguments<T>& arguments_)
        : arguments(arguments_),
          kernel(arguments_.parameters),
          d(arguments_.d),
          width(arguments_.d <= lanes / 2 ? lanes / 2 : (arguments_.d + lanes - 1) / lanes * lanes),
          // An odd number of cache lines from row to row: a power of two would put all rows into the same few sets.
          stride(width >= 8 * lanes && width / lanes % 2 == 0 ? width + lanes : width),
          tile(tile_rows(arguments_.n + arguments_.m)),
          tiles_x((arguments_.n + tile - 1) / tile),
          tiles_y((arguments_.m + tile - 1) / tile),
          tiles(tiles_x + tiles_y),
          exclude_same(metric != inner || arguments_.estimator != 1),
          exclude_cross(arguments_.estimator == 2),
          weighted(arguments_.x_weight != nullptr),
          rows(fields * tiles * tile * stride),
          panels(fields * tiles * tile * d),
          half(tiles * tile),
          along(second ? tiles * tile : 0),
          weights(weighted ? tiles * tile : 0),
          gradient(arguments_.gx ? (tiles_x + (arguments_.gy ? tiles_y : 0)) * tile * stride : 0),
          slopes(fields * tiles * tile),
          sums(tiles) {}

    T* rows_of(int64_t t, int field = 0) const { return rows.data + (field * tiles + t) * tile * stride; }
    T* panels_of(int64_t t, int field = 0) const { return panels.data + (field * tiles + t) * tile * d; }
    T* gradient_of(int64_t t) const { return gradient.data + t * tile * stride; }
    T* slopes_of(int64_t t, int field = 0) const { return slopes.data + (field * tiles + t) * tile; }

    void set_coefficients(int64_t item) {
        const double n = double(arguments.n), m = double(arguments.m);
        const bool biased = arguments.estimator == 1;
        coefficient[0] = 1 / (n * (biased ? n : n - 1));
        coefficient[1] = 1 / (m * (biased ? m : m - 1));
        coefficient[2] = 1 / (n * (exclude_cross ? n - 1 : m));
        if (arguments.coefficients != nullptr)
            std::copy_n(arguments.coefficients + 3 * item, 3, coefficient);
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
    void pack(int64_t t, int64_t item, const std::vector<double>& centre, double scale) {
        const int64_t count = points(t);
        for (int field = 0; field < fields; ++field) {
            const T* source = points_of(item, t, field);
            T *z = rows_of(t, field), *p = panels_of(t, field);
            std::memset(z, 0, tile * stride * sizeof(T));
            const double* middle = centre.data() + field * d;
            for (int64_t i = 0; i < count && source != nullptr; ++i)
                for (int64_t c = 0; c < d; ++c) z[i * stride + c] = T((source[i * d + c] - middle[c]) * scale);
            for (int64_t block = 0; block < tile; block += panel)
                for (int64_t c0 = 0; c0 < d; c0 += lanes)  // a cache line of each row
                    for (int64_t l = 0; l < panel; ++l)
                        for (int64_t c = c0; c < std::min(d, c0 + lanes); ++c)
                            p[block * d + c * panel + l] = z[(block + l) * stride + c];
            std::memset(slopes_of(t, field), 0, tile * sizeof(T));
        }
        T* h = half.data + t * tile;
        for (int64_t i = 0; i < tile; ++i) {
            const T* z = rows_of(t) + i * stride;
            const double norm = product(z, z);
            h[i] = i >= count ? no_pair : metric == expanded ? T(norm * -0.5) : T(0);
            if (!Kernel::vanishes && i < count && !(norm < none<T> / 4)) h[i] = std::numeric_limits<T>::quiet_NaN();
            if constexpr (second) along.data[t * tile + i] = T(product(z, rows_of(t, 1) + i * stride));
        }
        if (weighted) {
            const T* w = t < tiles_x ? arguments.x_weight + item * arguments.n + t * tile
                                     : arguments.y_weight + item * arguments.m + (t - tiles_x) * tile;
            for (int64_t i = 0; i < tile; ++i) weights.data[t * tile + i] = i < count ? w[i] : T(0);
        }
        if (wants_gradient(t)) std::memset(gradient_of(t), 0, tile * stride * sizeof(T));
        sums[t] = 0;
    }

    double product(const T* a, const T* b) const {
        constexpr int side = lanes / 2;
        double sums[side] = {}, sum = 0;
        for (int64_t c = 0; c < width; c += side)
            for (int l = 0; l < side; ++l) sums[l] += double(a[c + l]) * double(b[c + l]);
        for (const double s : sums) sum += s;
        return sum;
    }

    // u += what `add` makes of a row's and a panel's coordinate c, for a chunk of them, `strip` rows and a panel.
    template <class Add>
    FASTGEN_INLINE void accumulate(int64_t chunk, T* out, Add&& add) const {
        V u[strip][2];
        for (int r = 0; r < strip; ++r)
            for (int v = 0; v < 2; ++v) u[r][v] = *(const V*)(out + r * tile + v * lanes);
        for (int64_t c = 0; c < chunk; ++c) add(c, u);
        for (int r = 0; r < strip; ++r)
            for (int v = 0; v < 2; ++v) *(V*)(out + r * tile + v * lanes) = u[r][v];
    }

    // For `filled` rows of tile a and the columns of tile b: −½d², d² or products into w, and of second order, beyond
    // them, ⟨z_a, v_b⟩ + ⟨v_a, z_b⟩ or ⟨z_a − z_b, v_a − v_b⟩. A chunk of the columns' coordinates stays in the cache for
    // all rows.
    __attribute__((noinline)) void products(int64_t a, int64_t b, int64_t filled, int64_t columns, T* w) const {
        for (int64_t r = 0; r < filled; ++r) {
            const T h = half.data[a * tile + r];
            for (int64_t j = 0; j < columns; j += lanes)
                *(V*)(w + r * tile + j) = *(const V*)(half.data + b * tile + j) + h;
        }
        if (second) std::memset(w + kept, 0, filled * tile * sizeof(T));
        for (int64_t c0 = 0; c0 < d; c0 += chunk)
            for (int64_t r = 0; r < filled; r += strip)
                for (int64_t j = 0; j < columns; j += panel) {
                    const T *z = rows_of(a) + r * stride + c0, *p = panels_of(b) + j * d + c0 * panel;
                    const int64_t count = std::min<int64_t>(chunk, d - c0), step = stride;
                    T* out = w + r * tile + j;
                    accumulate(count, out, [=](int64_t c, V(&u)[strip][2]) FASTGEN_INLINE_LAMBDA {
                        const V p0 = *(const V*)(p + c * panel), p1 = *(const V*)(p + c * panel + lanes);
                        for (int k = 0; k < strip; ++k) {
                            const T s = z[k * step + c];
                            if constexpr (metric == direct) {
                                const V d0 = p0 - s, d1 = p1 - s;
                                u[k][0] += d0 * d0;
                                u[k][1] += d1 * d1;
                            } else {
                                u[k][0] += p0 * s;
                                u[k][1] += p1 * s;
                            }
                        }
                    });
                    if constexpr (second) {
                        const T *v = rows_of(a, 1) + r * stride + c0, *q = panels_of(b, 1) + j * d + c0 * panel;
                        accumulate(count, out + kept, [=](int64_t c, V(&u)[strip][2]) FASTGEN_INLINE_LAMBDA {
                            for (int half_panel = 0; half_panel < 2; ++half_panel) {
                                const V zb = *(const V*)(p + c * panel + half_panel * lanes);
                                const V vb = *(const V*)(q + c * panel + half_panel * lanes);
                                for (int k = 0; k < strip; ++k) {
                                    const T za = z[k * step + c], va = v[k * step + c];
                                    if constexpr (metric == direct)
                                        u[k][half_panel] += (zb - za) * (vb - va);
                                    else
                                        u[k][half_panel] += zb * va + vb * za;
                                }
                            }
                        });
                    }
                }
    }

    // The kernel's sum over `strip` rows from i and the columns of tile b, whose products are in w; and there in their place,
    // of order 1, the slopes, of order 2 also the bends times the projections.
    template <int order, bool weighing>
    __attribute__((noinline)) double sweep(int64_t a, int64_t b, int64_t i, int64_t columns, bool diagonal, T* w,
                                           V* column_slopes, T pulled) const {
        V total{};
        V row_slopes[fields][strip] = {};
        for (int64_t j = 0; j < columns; j += panel) {
            V u[strip][2];
            for (int r = 0; r < strip; ++r)
                for (int v = 0; v < 2; ++v) u[r][v] = *(const V*)(w + r * tile + j + v * lanes);
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
                    V weight, bend, distance = u[r][v];
                    if constexpr (metric == expanded) distance = (distance > T(0) ? V{} : distance) * T(-2);  // NaN stays
                    V k = kernel.template operator()<order>(distance, weight, bend);
                    if constexpr (order > 1) {
                        V s = *(const V*)(w + kept + r * tile + j + v * lanes);
                        if constexpr (metric == expanded)
                            s = *(const V*)(along.data + b * tile + j + v * lanes) + along.data[a * tile + i + r] - s;
                        bend *= metric == inner ? s : s * T(-2);
                    }
                    if constexpr (weighing) {
                        const T* own = weights.data + a * tile + i + r;
                        const V both = *(const V*)(weights.data + b * tile + j + v * lanes) * *own;
                        k *= both;
                        if constexpr (order > 0) weight *= both;
                        if constexpr (order > 1) bend *= both;
                    }
                    total += k;
                    if constexpr (order > 0) {
                        *(V*)(w + r * tile + j + v * lanes) = weight;
                        row_slopes[0][r] += weight;
                        column_slopes[j / lanes + v] += weight;
                    }
                    if constexpr (order > 1) {
                        *(V*)(w + kept + r * tile + j + v * lanes) = bend;
                        row_slopes[1][r] += bend;
                        column_slopes[(largest + j) / lanes + v] += bend;
                    }
                }
        }
        if constexpr (order > 0)
            for (int field = 0; field < fields; ++field)
                for (int r = 0; r < strip; ++r)
                    slopes_of(a, field)[i + r] += pulled * T(lane_sum<T>(row_slopes[field][r]));
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
        const int64_t filled = (points(a) + strip - 1) / strip * strip, columns = (points(b) + panel - 1) / panel * panel;
        if (second && !for_a) return;
        double total = 0;
        alignas(64) T w[fields * kept];
        V column_slopes[fields * largest / lanes] = {};
        products(a, b, filled, columns, w);
        for (int64_t i = 0; i < filled; i += strip)
            total += for_a ? sweep<gradients, weighing>(a, b, i, columns, diagonal, w + i * tile, column_slopes, pulled)
                           : sweep<0, weighing>(a, b, i, columns, diagonal, w + i * tile, nullptr, pulled);
        for (int field = 0; field < fields && for_a; ++field) {
            const T* factors = w + field * kept;
            const int of = fields - 1 - field;  // slopes pull towards the directions, bends towards the points
            gather<T>(factors, tile, 1, filled, columns, rows_of(b, of), gradient_of(a), width, stride, pulled);
            if (for_b) gather<T>(factors, 1, tile, columns, filled, rows_of(a, of), gradient_of(b), width, stride, pulled);
        }
        for (int field = 0; field < fields && for_b; ++field)
            for (int64_t j = 0; j < columns; ++j)
                slopes_of(b, field)[j] += pulled * column_slopes[(field * largest + j) / lanes][j % lanes];
        sums[a] += total * coefficient[which] * (a == b ? 1 : 2);  // a tile against itself meets each pair twice
    }

    void task(int64_t a, int64_t b) { weighted ? task_of<true>(a, b) : task_of<false>(a, b); }

    void finish(int64_t t, T* out, double scale) const {
        const T* g = gradient_of(t);
        for (int64_t i = 0, count = points(t); i < count; ++i) {
            const T *z = rows_of(t, fields - 1) + i * stride, *v = rows_of(t) + i * stride;
            const T w = metric == inner ? T(0) : slopes_of(t)[i];
            const T e = metric == inner || !second ? T(0) : slopes_of(t, fields - 1)[i];
            for (int64_t c = 0; c < d; ++c) {
                T sum = g[i * stride + c] - w * z[c];
                if (second) sum -= e * v[c];
                out[i * d + c] = T(scale * sum);
            }
        }
    }

    // Null where y has no direction.
    const T* points_of(int64_t item, int64_t t, int field) const {
        const T* of = t < tiles_x ? (field ? arguments.vx : arguments.x) : (field ? arguments.vy : arguments.y);
        const int64_t first = t < tiles_x ? item * arguments.n + t * tile : item * arguments.m + (t - tiles_x) * tile;
        return of == nullptr ? nullptr : of + first * d;
    }

    void run(int64_t item, int threads) {
        const int64_t seats = tiles + tiles % 2, rounds = seats - 1;
        std::vector<double> centre(fields * d), partial(tiles * d);  // directions need no centre
        const double scale = 1 / std::sqrt(kernel.base);
        set_coefficients(item);
        // d/dz_i of coefficient · Σ k: twice for the two orders of a pair, twice for a square's own derivative.
        const double out_scale = (metric == inner ? 2 : 4) * unit * scale;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; ++t)
                for (int64_t i = 0, count = points(t); i < count; ++i) {
                    const T* source = points_of(item, t, 0) + i * d;
                    double* sum = partial.data() + t * d;
                    for (int64_t c = 0; c < d; ++c) sum[c] += source[c];
                }
#pragma omp single
            for (int64_t c = 0; c < d; ++c) {
                for (int64_t t = 0; t < tiles && metric != inner; ++t) centre[c] += partial[t * d + c];
                centre[c] /= double(arguments.n + arguments.m);
            }
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; ++t) pack(t, item, centre, scale);
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
        if (second) return;
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

template <class T, class Kernel, bool second>
void mmd_kernel(const MmdArguments<T>& arguments) {
    if (arguments.batch < arguments.threads || arguments.batch == 1) {
        Pairs<T, Kernel, second> pairs(arguments);
        // Tens of microseconds of work are not worth waking a thread for.
        const double points = double(arguments.n + arguments.m), work = points * points * double(arguments.d + 16);
        const int threads = work < 4e6 ? 1 : arguments.threads;
        for (int64_t item = 0; item < arguments.batch; ++item) pairs.run(item, threads);
        return;
    }
    // Made here: an exception must not leave a parallel region.
    std::vector<std::unique_ptr<Pairs<T, Kernel, second>>> own;
    for (int t = 0; t < arguments.threads; ++t) own.push_back(std::make_unique<Pairs<T, Kernel, second>>(arguments));
#pragma omp parallel for num_threads(arguments.threads) schedule(static)
    for (int t = 0; t < arguments.threads; ++t)
        for (int64_t item = t; item < arguments.batch; item += arguments.threads) own[t]->run(item, 1);
}

template <class T, bool second>
void mmd_of(const MmdArguments<T>& arguments) {
    const std::string& kind = arguments.kind;
    if constexpr (!second)
        if (kind == "imq_pairs") return mmd_kernel<T, ImqPairs<T>, second>(arguments);
    if constexpr (!second || sizeof(T) == 8) {  // in float32 the two parts of a root's second derivative would cancel
        if (kind == "laplacian") return mmd_kernel<T, Laplacian<T>, second>(arguments);
        if (kind == "energy") return mmd_kernel<T, Energy<T>, second>(arguments);
    }
    if (kind == "imq") return mmd_kernel<T, ImqSum<T>, second>(arguments);
    if (kind == "rbf") return mmd_kernel<T, Rbf<T>, second>(arguments);
    if (kind == "rational_quadratic") return mmd_kernel<T, RationalQuadratic<T>, second>(arguments);
    if (kind == "polynomial") return mmd_kernel<T, Polynomial<T>, second>(arguments);
    throw std::invalid_argument("mmd: no such kernel: " + kind);
}

template <class T>
void mmd_all(const MmdArguments<T>& arguments) {
    mmd_of<T, false>(arguments);
}

template <class T>
void mmd_second_all(const MmdArguments<T>& arguments) {
    mmd_of<T, true>(arguments);
}

#undef FASTGEN_INLINE
#undef FASTGEN_INLINE_LAMBDA
