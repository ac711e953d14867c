// Sums of rows weighted by a tile of factors, register-blocked: the gradients' matrix products.

template <class T>
struct Buffer {
    T* data;
    explicit Buffer(int64_t count)
        : data(static_cast<T*>(std::aligned_alloc(64, (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64))) {
        if (data == nullptr) throw std::bad_alloc();
        large_pages(data, count * int64_t(sizeof(T)));
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

constexpr int strip_rows = VEC_BYTES == 64 ? 8 : 4;  // rows of the register block; its columns are two vectors

template <class T>
FASTGEN_INLINE typename Lanes<T>::Wide wide(const T* of) {
    typename Lanes<T>::Half x;
    std::memcpy(&x, of, sizeof(x));
    return __builtin_convertvector(x, typename Lanes<T>::Wide);
}

template <class V>
FASTGEN_INLINE V load(const double* of) {
    V x;
    std::memcpy(&x, of, sizeof(x));
    return x;
}

// Adds `count` rows of d coordinates to `sums`, in float64.
template <class T>
void add_rows(const T* rows, int64_t count, int64_t d, double* sums) {
    using Wide = typename Lanes<T>::Wide;
    constexpr int side = Lanes<T>::count / 2;
    const int64_t fours = count / 4 * 4;  // at once: a sum in memory waits for the one before
    for (int64_t i = 0; i < fours; i += 4, rows += 4 * d) {
        int64_t c = 0;
        for (; c + side <= d; c += side) {
            const Wide sum = load<Wide>(sums + c) + ((wide(rows + c) + wide(rows + d + c)) +
                                                     (wide(rows + 2 * d + c) + wide(rows + 3 * d + c)));
            std::memcpy(sums + c, &sum, sizeof(sum));
        }
        for (; c < d; ++c) sums[c] += (double(rows[c]) + rows[d + c]) + (double(rows[2 * d + c]) + rows[3 * d + c]);
    }
    for (int64_t i = fours; i < count; ++i, rows += d)
        for (int64_t c = 0; c < d; ++c) sums[c] += rows[c];
}

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
void gather_columns(const T* w, int64_t step_a, int64_t step_b, int64_t count_a, int64_t terms, const T* z, T* g,
                    int64_t stride, T scale) {
    constexpr int64_t block = 32;  // rows z that stay in the nearest cache for all a
    for (int64_t b = 0; b < terms; b += block)
        for (int64_t a = 0; a < count_a; a += count)
            weighted_sums<T, Z, count, width>(w + a * step_a + b * step_b, step_a, step_b, std::min(block, terms - b),
                                              z + b * stride, g + a * stride, stride, scale);
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

// Of points of few coordinates: columns b take Σ_a w[a][b] z_a into g, which has a row for each coordinate. As many
// multiplications for a vector of pairs as the points have coordinates, where rows of half a vector would take sixteen.
template <class T>
void gather_across(const T* w, int64_t pitch, int64_t terms, int64_t columns, const T* z, int64_t stride, T* g,
                   int64_t row, int64_t d, T scale) {
    using V = Vec<T>;
    constexpr int lanes = Lanes<T>::count, count = std::min(4, lanes / 2);  // points are padded to half a vector
    for (int64_t b = 0; b < columns; b += 2 * lanes)
        for (int64_t c = 0; c < d; c += count) {
            V sums[count][2] = {};
            for (int64_t a = 0; a < terms; ++a) {
                const V w0 = *(const V*)(w + a * pitch + b), w1 = *(const V*)(w + a * pitch + b + lanes);
                for (int k = 0; k < count; ++k) {
                    const T factor = z[a * stride + c + k];
                    sums[k][0] += w0 * factor;
                    sums[k][1] += w1 * factor;
                }
            }
            for (int k = 0; k < count; ++k)
                for (int v = 0; v < 2; ++v) *(V*)(g + (c + k) * row + b + v * lanes) += sums[k][v] * scale;
        }
}

// Of points of few coordinates by differences, for slopes that grow without bound between close points, where w z_b and
// w z_a would cancel: columns b take Σ_a w (z_a − z_b) into g as above, p being their panel of `2 lanes` columns.
template <class T>
void differences_across(const T* w, int64_t pitch, int64_t terms, int64_t columns, const T* z, int64_t stride, const T* p,
                        T* g, int64_t row, int64_t d, T scale) {
    using V = Vec<T>;
    constexpr int lanes = Lanes<T>::count;
    for (int64_t b = 0; b < columns; b += lanes)
        for (int64_t c = 0; c < d; ++c) {
            const V own = *(const V*)(p + b / (2 * lanes) * 2 * lanes * d + c * 2 * lanes + b % (2 * lanes));
            V sum{};
            for (int64_t a = 0; a < terms; ++a) sum += *(const V*)(w + a * pitch + b) * (z[a * stride + c] - own);
            *(V*)(g + c * row + b) += sum * scale;
        }
}

// And rows a take Σ_b w (z_b − z_a).
template <class T>
void differences_along(const T* w, int64_t pitch, int64_t rows, int64_t columns, const T* z, int64_t stride, const T* p,
                       T* g, int64_t d, T scale) {
    using V = Vec<T>;
    constexpr int lanes = Lanes<T>::count;
    for (int64_t a = 0; a < rows; ++a)
        for (int64_t c = 0; c < d; ++c) {
            V sum{};
            for (int64_t b = 0; b < columns; b += lanes) {
                const V other = *(const V*)(p + b / (2 * lanes) * 2 * lanes * d + c * 2 * lanes + b % (2 * lanes));
                sum += *(const V*)(w + a * pitch + b) * (other - z[a * stride + c]);
            }
            g[a * stride + c] += scale * T(lane_sum<T>(&sum));
        }
}
