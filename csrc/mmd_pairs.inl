// One pass over all pairs of the pooled points Z = [X; Y], cut into tiles. A task is a pair of tiles: distances by a
// register-blocked product, from those registers kernel value k and slope w = −dk/du of each pair, then w's products with
// both tiles for the gradients. Each unordered pair is visited once: XX and YY cost half of their square.
//
// Tasks run in rounds of a round-robin tournament: within a round no two tasks share a tile, so that every tile's sums
// are made by one thread at a time and in the same order for any number of threads, without a copy for each thread. Of few
// points two teams of tasks make a sum each, on a thread each that shares nothing with the other but the points given.
//
// Units: u = d²/base, with the coordinates centred on the common mean and divided by √base, as ‖z_a‖² + ‖z_b‖² and the
// product of one row with −2 of the other; or as the sum of their squared differences; or, not centred, their product u.
//
// The gradient is Σ_b w (z_b − z_a), the Hessian's product with directions v, in the same units,
//   Σ_b w (v_b − v_a) + e (z_b − z_a),   e = −2 d²k/du² ⟨z_a − z_b, v_a − v_b⟩;
// of inner products Σ_b w z_b, and Σ_b w v_b + e z_b with e = d²k/du² (⟨z_a, v_b⟩ + ⟨v_a, z_b⟩). So it is the gradient with
// two pairs of factors and points in place of one: `second` below.

#include "mmd_kernels.inl"
#include "mmd_sums.inl"

template <class T, class Kernel, bool second>
struct Pairs {
    using V = Vec<T>;
    using I = typename Lanes<T>::I;
    using Half = typename Lanes<T>::Half;
    static constexpr int lanes = Lanes<T>::count;
    static constexpr int side = lanes / 2;
    using Wide = typename Lanes<T>::Wide;
    static constexpr int strip = strip_rows;
    static constexpr int panel = 2 * lanes;
    static constexpr int fields = second ? 2 : 1;     // of points: z, and the directions v
    static constexpr int gradients = second ? 2 : 1;  // the order of a sweep that makes them
    static constexpr int largest = 128;               // rows of a tile
    static constexpr int chunk = 256;                 // coordinates of a panel's products made at once
    static constexpr int pitch = largest + lanes;     // of the slopes' rows: columns of them spread over the cache's sets
    static constexpr int kept = largest * pitch;      // slopes of a task, before the gradients' products
    static constexpr Metric metric = Kernel::metric;
    static constexpr T no_pair = metric == inner ? -far<T> : far<T>;  // what a sweep's sum is for a pair that is none
    static constexpr T in_panels = metric == expanded ? T(-2) : T(1);

    const MmdArguments<T>& arguments;
    const Kernel kernel;
    const int64_t d, width, stride, tile, tiles_x, tiles_y, tiles, last_chunk;
    const bool thin, differences, exclude_same, exclude_cross, weighted;
    Buffer<T> memory;                 // of all that follows
    T *const rows, *const panels;     // of each field: the points by rows and in panels of columns
    T *const norms, *const along, *const weights;  // ‖z‖², −2⟨z, v⟩, the points' weights
    T *const gradient, *const slopes;  // Σ w z, Σ w; or Σ w v + e z, Σ w and Σ e
    std::vector<double> sums;               // of each tile
    double coefficient[3], pull[3], unit;   // of XX, YY, XY: in the value, and in the gradient relative to one of them

    static bool few(const MmdArguments<T>& arguments) { return arguments.n + arguments.m <= 512; }

    Pairs(const MmdArguments<T>& arguments_)
        : arguments(arguments_),
          kernel(arguments_.parameters),
          d(arguments_.d),
          width(arguments_.d <= lanes / 2 ? lanes / 2 : (arguments_.d + lanes - 1) / lanes * lanes),
          // An odd number of cache lines from row to row: a power of two would put all rows into the same few sets.
          stride(width >= 8 * lanes && width / lanes % 2 == 0 ? width + lanes : width),
          // Large tiles are fetched less often for each pair, and few points still make many tasks.
          tile(few(arguments_) ? 64 : 128),
          tiles_x((arguments_.n + tile - 1) / tile),
          tiles_y((arguments_.m + tile - 1) / tile),
          tiles(tiles_x + tiles_y),
          last_chunk((arguments_.d - 1) / chunk * chunk),
          thin(width < lanes),
          differences(thin && metric == direct),
          exclude_same(metric != inner || arguments_.estimator != 1),
          exclude_cross(arguments_.estimator == 2),
          weighted(arguments_.x_weight != nullptr),
          memory(tiles * tile * (fields * (stride + d + 1) + 1 + second + weighted) +
                 pulled_tiles() * tile * (stride + thin * width)),
          rows(memory.data),
          panels(rows + fields * tiles * tile * stride),
          norms(panels + fields * tiles * tile * d),
          along(norms + tiles * tile),
          weights(along + second * tiles * tile),
          gradient(weights + weighted * tiles * tile),
          slopes(gradient + pulled_tiles() * tile * (stride + thin * width)),
          sums(tiles) {}

    int64_t pulled_tiles() const { return arguments.gx == nullptr ? 0 : tiles_x + (arguments.gy ? tiles_y : 0); }
    T* rows_of(int64_t t, int field = 0) const { return rows + (field * tiles + t) * tile * stride; }
    T* panels_of(int64_t t, int field = 0) const { return panels + (field * tiles + t) * tile * d; }
    T* gradient_of(int64_t t) const { return gradient + t * tile * (stride + thin * width); }
    T* across_of(int64_t t) const { return gradient_of(t) + tile * stride; }  // of thin points another part, transposed
    T* slopes_of(int64_t t, int field = 0) const { return slopes + (field * tiles + t) * tile; }

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
    // and no distance that overflows for one that is known, points that far out become NaN.
    void pack(int64_t t, int64_t item, const std::vector<double>& centre) {
        const double scale = 1 / std::sqrt(kernel.base);
        const int64_t count = points(t);
        for (int field = 0; field < fields; ++field) {
            const T* source = points_of(item, t, field);
            T *z = rows_of(t, field), *p = panels_of(t, field);
            std::memset(z, 0, tile * stride * sizeof(T));
            const double* middle = centre.data() + field * d;
            for (int64_t i = 0; i < count && source != nullptr; ++i) {
                int64_t c = 0;
                for (; c + side <= d; c += side) {
                    const Half moved =
                        __builtin_convertvector((wide(source + i * d + c) - load<Wide>(middle + c)) * scale, Half);
                    std::memcpy(z + i * stride + c, &moved, sizeof(moved));
                }
                for (; c < d; ++c) z[i * stride + c] = T((source[i * d + c] - middle[c]) * scale);
            }
            for (int64_t block = 0; block < tile; block += panel)
                for (int64_t c0 = 0; c0 < d; c0 += lanes)  // a cache line of each row
                    for (int64_t c = c0; c < std::min(d, c0 + lanes); ++c)
                        for (int64_t l = 0; l < panel; ++l)
                            p[block * d + c * panel + l] = z[(block + l) * stride + c] * in_panels;
        }
        T* h = norms + t * tile;
        for (int64_t block = 0; block < tile; block += panel) {
            Wide squares[4] = {};
            for (int64_t c = 0; c < d; ++c)
                for (int part = 0; part < 4; ++part) {
                    const Wide z = wide(panels_of(t) + block * d + c * panel + part * side);
                    squares[part] += z * z;
                }
            for (int64_t l = 0; l < panel; ++l) {
                const double norm = squares[l / side][l % side] / (in_panels * in_panels);
                const bool outside = !(norm < none<T> / 4);
                h[block + l] = block + l >= count ? no_pair
                               : outside          ? std::numeric_limits<T>::quiet_NaN()
                               : metric == expanded ? T(norm)
                                                    : T(0);
            }
        }
        for (int64_t i = 0; i < tile && second; ++i)
            along[t * tile + i] = T(-2 * product(rows_of(t) + i * stride, rows_of(t, 1) + i * stride));
        if (weighted) {
            const T* w = t < tiles_x ? arguments.x_weight + item * arguments.n + t * tile
                                     : arguments.y_weight + item * arguments.m + (t - tiles_x) * tile;
            for (int64_t i = 0; i < tile; ++i) weights[t * tile + i] = i < count ? w[i] : T(0);
        }
    }

    void clear(int64_t t) {
        for (int field = 0; field < fields; ++field) std::memset(slopes_of(t, field), 0, tile * sizeof(T));
        if (wants_gradient(t)) std::memset(gradient_of(t), 0, tile * (stride + thin * width) * sizeof(T));
        sums[t] = 0;
    }

    double product(const T* a, const T* b) const {
        Wide sums{};
        for (int64_t c = 0; c < width; c += side) sums += wide(a + c) * wide(b + c);
        return lane_sum<double, sizeof(Wide)>(&sums);
    }

    // u += the products of `strip` rows of tile a from r with the panel of tile b from column j, of the chunk of coordinates
    // from c0: of the panel, which holds −2z for an expanded d², or squares of the differences.
    FASTGEN_INLINE void add_products(int64_t a, int64_t b, int64_t r, int64_t j, int64_t c0, V (&u)[strip][2]) const {
        const T *z = rows_of(a) + r * stride + c0, *p = panels_of(b) + j * d + c0 * panel;
        for (int64_t c = 0, count = std::min<int64_t>(chunk, d - c0); c < count; ++c) {
            const V p0 = *(const V*)(p + c * panel), p1 = *(const V*)(p + c * panel + lanes);
            for (int k = 0; k < strip; ++k) {
                const T s = z[k * stride + c];
                if constexpr (metric == direct) {
                    const V d0 = p0 - s, d1 = p1 - s;
                    u[k][0] += d0 * d0;
                    u[k][1] += d1 * d1;
                } else {
                    u[k][0] += p0 * s;
                    u[k][1] += p1 * s;
                }
            }
        }
    }

    // Likewise of second order, in the panel's scale: ⟨z_a, v_b⟩ + ⟨v_a, z_b⟩ or ⟨z_a − z_b, v_a − v_b⟩.
    FASTGEN_INLINE void add_projections(int64_t a, int64_t b, int64_t r, int64_t j, int64_t c0, V (&s)[strip][2]) const {
        const T *z = rows_of(a) + r * stride + c0, *p = panels_of(b) + j * d + c0 * panel;
        const T *v = rows_of(a, 1) + r * stride + c0, *q = panels_of(b, 1) + j * d + c0 * panel;
        for (int64_t c = 0, count = std::min<int64_t>(chunk, d - c0); c < count; ++c)
            for (int half_panel = 0; half_panel < 2; ++half_panel) {
                const V zb = *(const V*)(p + c * panel + half_panel * lanes);
                const V vb = *(const V*)(q + c * panel + half_panel * lanes);
                for (int k = 0; k < strip; ++k) {
                    const T za = z[k * stride + c], va = v[k * stride + c];
                    if constexpr (metric == direct)
                        s[k][half_panel] += (zb - za) * (vb - va);
                    else
                        s[k][half_panel] += zb * va + vb * za;
                }
            }
    }

    // What the sums of `strip` rows and a panel start from, or have come to in w.
    FASTGEN_INLINE void start(int64_t a, int64_t b, int64_t r, int64_t j, bool begun, const T* w, V (&u)[strip][2]) const {
        for (int k = 0; k < strip; ++k)
            for (int v = 0; v < 2; ++v)
                u[k][v] = begun ? *(const V*)(w + k * pitch + j + v * lanes)
                                : *(const V*)(norms + b * tile + j + v * lanes) + norms[a * tile + r + k];
    }

    FASTGEN_INLINE void start_projections(int64_t j, bool begun, const T* w, V (&s)[strip][2]) const {
        for (int k = 0; k < strip; ++k)
            for (int v = 0; v < 2; ++v) s[k][v] = begun ? *(const V*)(w + kept + k * pitch + j + v * lanes) : V{};
    }

    FASTGEN_INLINE static void store(T* w, int64_t j, const V (&u)[strip][2]) {
        for (int k = 0; k < strip; ++k)
            for (int v = 0; v < 2; ++v) *(V*)(w + k * pitch + j + v * lanes) = u[k][v];
    }

    // Of more coordinates than a chunk has, all chunks but the last: their sums into w. A chunk of a panel stays in the
    // cache for all rows.
    __attribute__((noinline)) void products(int64_t a, int64_t b, int64_t filled, int64_t columns, T* w) const {
        for (int64_t c0 = 0; c0 < last_chunk; c0 += chunk)
            for (int64_t j = 0; j < columns; j += panel)
                for (int64_t r = 0; r < filled; r += strip) {
                    V u[strip][2];
                    start(a, b, r, j, c0 > 0, w + r * pitch, u);
                    add_products(a, b, r, j, c0, u);
                    store(w + r * pitch, j, u);
                    if constexpr (second) {
                        start_projections(j, c0 > 0, w + r * pitch, u);
                        add_projections(a, b, r, j, c0, u);
                        store(w + kept + r * pitch, j, u);
                    }
                }
    }

    // For `strip` rows from i and the columns of tile b: the last chunk's products, then the kernel's sum; and into w, of
    // order 1, the slopes, of order 2 also the bends times the projections. Of a tile against itself no panel left of the
    // rows' own: those pairs are met the other way round.
    template <int order, bool weighing>
    __attribute__((noinline)) double sweep(int64_t a, int64_t b, int64_t i, int64_t columns, bool diagonal, T* w,
                                           V* column_slopes, bool pulls_rows, T pulled) const {
        const int64_t begin = a == b ? i / panel * panel : 0;
        const bool right = a != b || begin + panel < columns;  // whether any column's panel is not the rows' own
        V total{};
        V row_slopes[fields][strip];
        for (auto& field : row_slopes)
            for (V& s : field) s = V{};
        for (int64_t j = begin; j < columns; j += panel) {
            if (a == b && j == begin + panel) {  // so far both orders of each pair, from here on one
                total *= T(0.5);
                for (auto& field : row_slopes)
                    for (V& s : field) s = V{};
            }
            V u[strip][2], projections[strip][2];
            if constexpr (order > 1) {
                start_projections(j, last_chunk > 0, w, projections);
                add_projections(a, b, i, j, last_chunk, projections);
            }
            start(a, b, i, j, last_chunk > 0, w, u);
            add_products(a, b, i, j, last_chunk, u);
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
                    if constexpr (metric == expanded) distance = at_least_zero<T>(distance);
                    V k = kernel.template operator()<order>(distance, weight, bend);
                    if constexpr (order > 1) {
                        const V s = projections[r][v];
                        if constexpr (metric == expanded)
                            bend *= *(const V*)(along + b * tile + j + v * lanes) + along[a * tile + i + r] - s;
                        else
                            bend *= metric == inner ? s : s * T(-2);
                    }
                    if constexpr (weighing) {
                        const T* own = weights + a * tile + i + r;
                        const V both = *(const V*)(weights + b * tile + j + v * lanes) * *own;
                        k *= both;
                        if constexpr (order > 0) weight *= both;
                        if constexpr (order > 1) bend *= both;
                    }
                    total += k;
                    if constexpr (order > 0) {
                        *(V*)(w + r * pitch + j + v * lanes) = weight;
                        row_slopes[0][r] += weight;
                        column_slopes[j / lanes + v] += weight;
                    }
                    if constexpr (order > 1) {
                        *(V*)(w + kept + r * pitch + j + v * lanes) = bend;
                        row_slopes[1][r] += bend;
                        column_slopes[(largest + j) / lanes + v] += bend;
                    }
                }
        }
        if (order > 0 && pulls_rows && right)
            for (int field = 0; field < fields; ++field)
                for (int r = 0; r < strip; ++r)
                    slopes_of(a, field)[i + r] += pulled * T(lane_sum<T>(&row_slopes[field][r]));
        return (a == b && right ? 2 : 1) * lane_sum<T>(&total);
    }

    template <bool weighing>
    void task_of(int64_t a, int64_t b) {
        if (wants_gradient(a) && !wants_gradient(b)) std::swap(a, b);
        const bool same = (a < tiles_x) == (b < tiles_x);
        const int which = !same ? 2 : a < tiles_x ? 0 : 1;
        if ((arguments.terms >> which & 1) == 0) return;
        const bool pulls_columns = wants_gradient(b), pulls_rows = wants_gradient(a);
        if (second && !pulls_columns) return;
        const bool diagonal = (a == b && exclude_same) ||
                              (exclude_cross && std::max(a, b) - std::min(a, b) == tiles_x && !same);
        const T pulled = T(pull[which]);
        const int64_t filled = (points(a) + strip - 1) / strip * strip, columns = (points(b) + panel - 1) / panel * panel;
        double total = 0;
        alignas(64) T w[fields * kept];
        V column_slopes[fields * largest / lanes] = {};
        products(a, b, filled, columns, w);
        for (int64_t i = 0; i < filled; i += strip)
            total += pulls_columns ? sweep<gradients, weighing>(a, b, i, columns, diagonal, w + i * pitch, column_slopes,
                                                                pulls_rows, pulled)
                                   : sweep<0, weighing>(a, b, i, columns, diagonal, w + i * pitch, nullptr, false, pulled);
        for (int field = 0; field < fields && pulls_columns; ++field) {
            const T* factors = w + field * kept;
            const int of = fields - 1 - field;  // slopes pull towards the directions, bends towards the points
            // Of a tile against itself panel by panel: the columns take the rows down to their own, the rows the columns
            // right of that.
            const int64_t breadth = a == b ? panel : columns, height = a == b ? panel : filled;
            for (int64_t j = 0; j < columns; j += breadth) {
                const int64_t terms = a == b ? std::min(filled, j + panel) : filled;
                if (differences)
                    differences_across<T>(factors + j, pitch, terms, breadth, rows_of(a, of), stride,
                                          panels_of(b, of) + j * d, across_of(b) + j, tile, d, pulled);
                else if (thin)
                    gather_across<T>(factors + j, pitch, terms, breadth, rows_of(a, of), stride, across_of(b) + j, tile, d,
                                     pulled);
                else
                    gather<T>(factors + j, 1, pitch, breadth, terms, rows_of(a, of), gradient_of(b) + j * stride, width, stride,
                              pulled);
            }
            for (int64_t i = 0; i < filled && pulls_rows; i += height) {
                const int64_t j = a == b ? i + panel : 0, rows = std::min(height, filled - i);
                if (differences)
                    differences_along<T>(factors + i * pitch + j, pitch, rows, columns - j, rows_of(a, of) + i * stride,
                                         stride, panels_of(b, of) + j * d, gradient_of(a) + i * stride, d, pulled);
                else
                    gather<T>(factors + i * pitch + j, pitch, 1, rows, columns - j, rows_of(b, of) + j * stride,
                              gradient_of(a) + i * stride, width, stride, pulled);
            }
            for (int64_t j = 0; j < columns; j += lanes)
                *(V*)(slopes_of(b, field) + j) += column_slopes[(field * largest + j) / lanes] * pulled;
        }
        sums[a] += total * coefficient[which] * (a == b ? 1 : 2);  // a tile against itself meets each pair twice
    }

    void task(int64_t a, int64_t b) { weighted ? task_of<true>(a, b) : task_of<false>(a, b); }

    // gx and gy: where this item's gradients go, or null.
    void finish(int64_t t, T* gx, T* gy, double scale) {
        if (!wants_gradient(t)) return;
        T* out = t < tiles_x ? gx + t * tile * d : gy + (t - tiles_x) * tile * d;
        T* g = gradient_of(t);
        for (int64_t i = 0; i < tile && thin; ++i)
            for (int64_t c = 0; c < d; ++c) g[i * stride + c] += across_of(t)[c * tile + i];
        for (int64_t i = 0, count = points(t); i < count; ++i) {
            const T *z = rows_of(t, fields - 1) + i * stride, *v = rows_of(t) + i * stride;
            const double w = metric == inner || differences ? 0 : slopes_of(t)[i];
            const double e = metric == inner || differences || !second ? 0 : slopes_of(t, fields - 1)[i];
            int64_t c = 0;
            for (; c + side <= d; c += side) {
                Wide sum = wide(g + i * stride + c) - w * wide(z + c);
                if (second) sum -= e * wide(v + c);
                const Half scaled = __builtin_convertvector(sum * scale, Half);
                std::memcpy(out + i * d + c, &scaled, sizeof(scaled));
            }
            for (; c < d; ++c)
                out[i * d + c] = T(scale * (g[i * stride + c] - w * z[c] - (second ? e * v[c] : 0)));
        }
    }

    // Null where y has no direction.
    const T* points_of(int64_t item, int64_t t, int field) const {
        const T* of = t < tiles_x ? (field ? arguments.vx : arguments.x) : (field ? arguments.vy : arguments.y);
        const int64_t first = t < tiles_x ? item * arguments.n + t * tile : item * arguments.m + (t - tiles_x) * tile;
        return of == nullptr ? nullptr : of + first * d;
    }

    void add_up(int64_t t, int64_t item, double* sums) const {
        add_rows(points_of(item, t, 0), points(t), d, sums);
    }

    void find_centre(const std::vector<double>& partial, std::vector<double>& centre) const {
        for (int64_t c = 0; c < d; ++c) {
            for (int64_t t = 0; t < tiles && metric != inner; ++t) centre[c] += partial[t * d + c];
            centre[c] /= double(arguments.n + arguments.m);
        }
    }

    // Of d/dz_i of coefficient · Σ k: twice for the two orders of a pair, twice for a square's own derivative.
    double out_scale() const { return (metric == inner ? 2 : 4) * unit / std::sqrt(kernel.base); }

    void run(int64_t item, int threads) {
        const int64_t seats = tiles + tiles % 2, rounds = seats - 1;
        std::vector<double> centre(fields * d), partial(tiles * d);  // directions need no centre
        set_coefficients(item);
        T* gx = arguments.gx == nullptr ? nullptr : arguments.gx + item * arguments.n * d;
        T* gy = arguments.gy == nullptr ? nullptr : arguments.gy + item * arguments.m * d;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; ++t) add_up(t, item, partial.data() + t * d);
#pragma omp single
            find_centre(partial, centre);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; ++t) {
                pack(t, item, centre);
                clear(t);
            }
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
                finish(t, gx, gy, out_scale());
            }
        }
        write_value(item, std::accumulate(sums.begin(), sums.end(), 0.0));
    }

    void prepare(int64_t item) {
        std::vector<double> centre(fields * d), partial(tiles * d);
        set_coefficients(item);
        for (int64_t t = 0; t < tiles; ++t) add_up(t, item, partial.data() + t * d);
        find_centre(partial, centre);
        for (int64_t t = 0; t < tiles; ++t) pack(t, item, centre);
    }

    // A team's share of a prepared item's tasks, each given to the team that has less to do yet: its gradients, and its
    // part of the value.
    double share(int team, T* gx, T* gy) {
        double load[2] = {};
        for (int64_t t = 0; t < tiles; ++t) clear(t);
        for (int64_t a = 0; a < tiles; ++a)
            for (int64_t b = a; b < tiles; ++b) {
                const int of = load[1] < load[0];
                const int pulled = wants_gradient(a) + (a != b && wants_gradient(b));
                load[of] += double(points(a) * points(b)) * (double(d + 40) + pulled * double(d + 10));
                if (of == team) task(a, b);
            }
        for (int64_t t = 0; t < tiles; ++t) finish(t, gx, gy, out_scale());
        return std::accumulate(sums.begin(), sums.end(), 0.0);
    }

    void write_value(int64_t item, double value) {
        if (second) return;
        if (arguments.estimator == 1 && kernel.at_zero() != 0) {
            // The diagonal's pairs were left out above: their distance is exactly zero.
            double squares[2] = {double(arguments.n), double(arguments.m)};
            if (weighted) {
                squares[0] = squares[1] = 0;
                for (int64_t t = 0; t < tiles; ++t)
                    for (int64_t i = 0; i < tile; ++i)
                        squares[t >= tiles_x] += double(weights[t * tile + i]) * weights[t * tile + i];
            }
            for (int side = 0; side < 2; ++side)
                if (arguments.terms >> side & 1) value += kernel.at_zero() * coefficient[side] * squares[side];
        }
        arguments.value[item] = T(value);
    }
};
