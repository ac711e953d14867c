// The filter of the exact search, for one instruction set; nearest.cpp has the plan and the proof.

constexpr int LANES = VEC_BYTES / 4, VECTORS = 2, WIDTH = LANES * VECTORS, ROWS = VEC_BYTES == 64 ? 14 : 6;
typedef int32_t ints __attribute__((vector_size(VEC_BYTES)));

static inline ints splat(int32_t x) { return x - ints{}; }

// Each lane holds two 16-bit integers: acc + a0 b0 + a1 b1. Wrapping on the way is harmless, the final key fits.
static inline ints dot(ints acc, ints a, ints b) {
#if defined(FASTGEN_VNNI)
    return (ints)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif VEC_BYTES == 64
    return acc + (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif VEC_BYTES == 32
    return acc + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(FASTGEN_X86)
    return acc + (ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    int16_t x[2 * LANES], y[2 * LANES];
    std::memcpy(x, &a, sizeof x);
    std::memcpy(y, &b, sizeof y);
    for (int l = 0; l < LANES; ++l) acc[l] += x[2 * l] * y[2 * l] + x[2 * l + 1] * y[2 * l + 1];
    return acc;
#endif
}

struct AnyAtMost {  // does any lane hold a key at or below the limit?
#if VEC_BYTES == 64
    __mmask16 seen = 0;
    void add(ints keys, ints limit) { seen |= _mm512_cmple_epi32_mask((__m512i)keys, (__m512i)limit); }
    bool any() const { return seen != 0; }
#else
    ints seen{};
    void add(ints keys, ints limit) { seen |= keys <= limit; }
    bool any() const {
        int32_t all = 0;
        for (int l = 0; l < LANES; ++l) all |= seen[l];
        return all != 0;
    }
#endif
};

static inline ints smaller(ints a, ints b) { return a < b ? a : b; }

// Keys of ROWS queries against WIDTH database rows: half[column] + Σ query·panel (the query is packed negated). Returns
// the rows with a key at or below their limit as bits, their keys stored; nearly always none.
static uint32_t tile(const int32_t* __restrict query, const int32_t* __restrict panel, const int32_t* __restrict half,
                     const int32_t* __restrict limit, int64_t pairs, int32_t* __restrict keys) {
    ints acc[ROWS][VECTORS];
    const ints* b = (const ints*)panel;
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) acc[r][v] = ((const ints*)half)[v];
    for (int64_t p = 0; p < pairs; ++p, query += ROWS, b += VECTORS) {
        const ints b0 = b[0], b1 = b[1];
#pragma GCC unroll 14
        for (int r = 0; r < ROWS; ++r) {
            const ints a = splat(query[r]);
            acc[r][0] = dot(acc[r][0], a, b0);
            acc[r][1] = dot(acc[r][1], a, b1);
        }
    }
    AnyAtMost hit;
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; ++r) hit.add(smaller(acc[r][0], acc[r][1]), splat(limit[r]));
    if (__builtin_expect(!hit.any(), 1)) return 0;
    uint32_t rows = 0;
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; ++r) {
        AnyAtMost one;
        one.add(smaller(acc[r][0], acc[r][1]), splat(limit[r]));
        if (!one.any()) continue;
        rows |= 1u << r;
        for (int v = 0; v < VECTORS; ++v) std::memcpy(keys + r * WIDTH + v * LANES, &acc[r][v], sizeof(ints));
    }
    return rows;
}

static void filter(Group& group, const Database& database) {
    alignas(64) int32_t keys[ROWS * WIDTH];
    const int64_t panels = (database.size + WIDTH - 1) / WIDTH, pairs = database.pairs;
    const int64_t block = std::max<int64_t>(1, PANEL_BYTES / (WIDTH * pairs * 4));
    for (int64_t from = 0; from < panels; from += block) {
        const int64_t to = std::min(panels, from + block);
        for (int64_t row = 0; row < group.size; row += ROWS) {
            const int32_t* query = group.packed + row * pairs;
            for (int64_t panel = from; panel < to; ++panel) {
                uint32_t hits = tile(query, database.packed + panel * WIDTH * pairs, database.half + panel * WIDTH,
                                     group.limit + row, pairs, keys);
                for (; hits; hits &= hits - 1) {
                    const int r = __builtin_ctz(hits);
                    group.take(row + r, keys + r * WIDTH, database.rows + panel * WIDTH,
                               std::min<int64_t>(WIDTH, database.size - panel * WIDTH));
                }
            }
        }
    }
}

// Squared norms of centred rows; NaN or infinity where a row is not finite (or its centred coordinates are not).
template <class T>
static void norms(const T* x, const int64_t* rows, int64_t begin, int64_t end, int64_t d, const T* centre, double* out) {
    for (int64_t i = begin; i < end; ++i) {
        const T* row = x + (rows ? rows[i] : i) * d;
        double lane[16] = {}, sum = 0;
        int64_t t = 0;
        for (; t + 16 <= d; t += 16)
            for (int l = 0; l < 16; ++l) {
                const double step = row[t + l] - centre[t + l];
                lane[l] += step * step;
            }
        for (; t < d; ++t) {
            const double step = row[t] - centre[t];
            sum += step * step;
        }
        for (int l = 0; l < 16; ++l) sum += lane[l];
        out[i] = sum;
    }
}

// Rounds (x − centre)·inverse to 16-bit integers, an even number of them, and returns ‖what rounding took away‖.
template <class T>
static double quantise(const T* x, int64_t d, const T* centre, T inverse, int16_t* out) {
    const T magic = sizeof(T) == 4 ? T(12582912) : T(6755399441055744);  // 1.5·2^23, 1.5·2^52: adding rounds to integers
    T lane[16] = {}, sum = 0;
    int64_t t = 0;
    for (; t + 16 <= d; t += 16)
        for (int l = 0; l < 16; ++l) {
            const T scaled = (x[t + l] - centre[t + l]) * inverse, rounded = (scaled + magic) - magic;
            out[t + l] = int16_t(int32_t(rounded));
            lane[l] += (scaled - rounded) * (scaled - rounded);
        }
    for (; t < d; ++t) {
        const T scaled = (x[t] - centre[t]) * inverse, rounded = (scaled + magic) - magic;
        out[t] = int16_t(int32_t(rounded));
        sum += (scaled - rounded) * (scaled - rounded);
    }
    if (d & 1) out[d] = 0;
    for (int l = 0; l < 16; ++l) sum += lane[l];
    return std::sqrt(double(sum));
}

// Database rows [begin, end) of the bucket, whole panels, into panel[pair][column]; returns the largest rounding loss.
template <class T>
static double pack_panels(const T* x, const int64_t* rows, int64_t begin, int64_t end, int64_t d, const T* centre, T inverse,
                          int16_t* line, int32_t* packed) {
    const int64_t pairs = (d + 1) / 2;
    double loss = 0;
    for (int64_t i = begin; i < end; ++i) {
        loss = std::max(loss, quantise(x + rows[i] * d, d, centre, inverse, line));
        int32_t* column = packed + (i / WIDTH) * WIDTH * pairs + i % WIDTH;
        for (int64_t p = 0; p < pairs; ++p) std::memcpy(column + p * WIDTH, line + 2 * p, 4);
    }
    return loss;
}

template <class T>
static double pack_query(const T* x, int64_t row, int64_t d, const T* centre, T inverse, int16_t* line, int32_t* packed) {
    const int64_t pairs = (d + 1) / 2;
    const double loss = quantise(x, d, centre, T(-inverse), line);  // x·(−s) rounds to the negative: ties go to even
    int32_t* slot = packed + (row / ROWS) * ROWS * pairs + row % ROWS;
    for (int64_t p = 0; p < pairs; ++p) std::memcpy(slot + p * ROWS, line + 2 * p, 4);
    return loss;
}

template <class T>
struct Lanes {
    static constexpr int COUNT = VEC_BYTES / sizeof(T), LANE = 16 / sizeof(T);  // LANE: in 128 bits
    typedef T Vector __attribute__((vector_size(VEC_BYTES)));
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Integers __attribute__((vector_size(VEC_BYTES)));

    static Vector load(const T* x) {
        Vector v;
        std::memcpy(&v, x, sizeof v);
        return v;
    }

    static void float_bits(Vector v, int32_t* out) {
        for (int l = 0; l < COUNT; ++l) {
            const float one = float(v[l]);
            std::memcpy(out + l, &one, sizeof one);
        }
    }

    // Sums of neighbours, those of a and b: blocks of STEP elements interleaved within 128 bits, then blocks of 128 bits
    // one after the other, so that COUNT vectors end as one, in order, each step two shuffles of one instruction.
    template <int STEP, int... I>
    static Vector halved(Vector a, Vector b, std::integer_sequence<int, I...>) {
        constexpr auto from = [](int i, bool odd) {
            if (STEP >= LANE) {
                const int at = 2 * (i - i % LANE) + i % LANE;
                return at + odd * LANE;
            }
            const int at = i % LANE, block = at / STEP;
            return i - at + block / 2 * STEP + at % STEP + odd * LANE / 2 + block % 2 * COUNT;
        };
        return __builtin_shufflevector(a, b, from(I, false)...) + __builtin_shufflevector(a, b, from(I, true)...);
    }

    // Of a and b, STEP vectors apart, what the next step of a transposition needs: blocks of STEP lanes change places.
    template <int STEP, bool LATER, int... I>
    static Vector exchanged(Vector a, Vector b, std::integer_sequence<int, I...>) {
        constexpr auto from = [](int i) { return i & STEP ? COUNT + i - (LATER ? 0 : STEP) : i + (LATER ? STEP : 0); };
        return __builtin_shufflevector(a, b, from(I)...);
    }

    // Lane j of v[i] becomes lane i of v[j].
    template <int STEP = 1>
    static void transpose(Vector (&v)[COUNT]) {
        if constexpr (STEP < COUNT) {
            for (int i = 0; i < COUNT; ++i) {
                if (i & STEP) continue;
                const Vector a = v[i], b = v[i + STEP];
                v[i] = exchanged<STEP, false>(a, b, std::make_integer_sequence<int, COUNT>());
                v[i + STEP] = exchanged<STEP, true>(a, b, std::make_integer_sequence<int, COUNT>());
            }
            transpose<2 * STEP>(v);
        }
    }

    // Lane i of the result: the sum of the lanes of v[i].
    template <int STEP = 1>
    static Vector sums(const Vector (&v)[COUNT / STEP]) {
        if constexpr (STEP == COUNT) {
            return v[0];
        } else {
            Vector half[COUNT / STEP / 2];
            for (int i = 0; i < COUNT / STEP / 2; ++i)
                half[i] = halved<STEP>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, COUNT>());
            return sums<2 * STEP>(half);
        }
    }
};

// Squared distances of a query to COUNT rows, as float bits. `last` has all bits set in the lanes that d fills of the last
// vector, which ends where the row ends.
template <class T>
static inline void distance_bits(const T* query, const T* const* row, int64_t d, typename Lanes<T>::Integers last,
                                 int32_t* keys) {
    using L = Lanes<T>;
    using Vector = typename L::Vector;
    constexpr int AT_ONCE = L::COUNT < 8 ? L::COUNT : 8;  // as many pointers as there are registers for
    Vector sum[L::COUNT];
    for (int first = 0; first < L::COUNT; first += AT_ONCE) {
        Vector part[AT_ONCE] = {};
        int64_t t = 0;
        for (; t + L::COUNT <= d; t += L::COUNT) {
            const Vector q = L::load(query + t);
#pragma GCC unroll 8
            for (int r = 0; r < AT_ONCE; ++r) {
                const Vector step = q - L::load(row[first + r] + t);
                part[r] += step * step;
            }
        }
        for (int r = 0; t < d && r < AT_ONCE; ++r) {
            Vector q{}, b{};
            if (d >= L::COUNT) {
                q = L::load(query + d - L::COUNT), b = L::load(row[first + r] + d - L::COUNT);
            } else {
                std::memcpy(&q, query, size_t(d) * sizeof(T));
                std::memcpy(&b, row[first + r], size_t(d) * sizeof(T));
            }
            const Vector step = (Vector)((typename L::Integers)(q - b) & last);
            part[r] += step * step;
        }
        for (int r = 0; r < AT_ONCE; ++r) sum[first + r] = part[r];
    }
    L::float_bits(L::sums(sum), keys);
}

// Squared distances of several queries to COUNT rows, which are transposed once for all of them: a lane is a row.
template <class T>
struct Several {
    using L = Lanes<T>;
    using Vector = typename L::Vector;
    static constexpr int COUNT = L::COUNT;
    const int64_t d, blocks;
    Aligned<T> query, panel, total;  // query[block][coordinate][TOGETHER], panel[coordinate][row], total[query][row]

    Several(const T* rows, int64_t n, int64_t d)
        : d(d), blocks((n + TOGETHER - 1) / TOGETHER), query(blocks * TOGETHER * d), panel((DEEP + COUNT) * COUNT),
          total(blocks * TOGETHER * COUNT) {
        std::fill(query + 0, query + blocks * TOGETHER * d, T(0));
        for (int64_t i = 0; i < n; ++i)
            for (int64_t t = 0; t < d; ++t) query[(i / TOGETHER * d + t) * TOGETHER + i % TOGETHER] = rows[i * d + t];
    }

    void measure(const T* const* row) {
        for (int64_t from = 0; from < d; from += DEEP) {
            const int64_t depth = std::min(DEEP, d - from);
            for (int64_t t = 0; t < depth; t += COUNT) {
                Vector lines[COUNT] = {};
                for (int l = 0; l < COUNT; ++l)
                    if (t + COUNT <= depth) lines[l] = L::load(row[l] + from + t);
                    else std::memcpy(&lines[l], row[l] + from + t, size_t(depth - t) * sizeof(T));
                L::transpose(lines);
                std::memcpy(panel + t * COUNT, lines, sizeof lines);
            }
            for (int64_t block = 0; block < blocks; ++block) {
                Vector sum[TOGETHER] = {};
                const T* q = query + (block * d + from) * TOGETHER;
                for (int64_t t = 0; t < depth; ++t, q += TOGETHER) {
                    const Vector b = L::load(panel + t * COUNT);
#pragma GCC unroll 8
                    for (int r = 0; r < TOGETHER; ++r) {
                        const Vector step = b - q[r];
                        sum[r] += step * step;
                    }
                }
                T* out = total + block * TOGETHER * COUNT;
                for (int r = 0; r < TOGETHER; ++r, out += COUNT) {
                    if (from > 0) sum[r] += L::load(out);
                    std::memcpy(out, &sum[r], sizeof(Vector));
                }
            }
        }
    }

    void keys(int64_t slot, int32_t* out) const { L::float_bits(L::load(total + slot * COUNT), out); }
};

// Rows [begin, end) of the database, or of those that are allowed, once past every query. Returns a row that is not
// finite, or -1.
template <class T>
static int64_t scan(Group& group, const int64_t* allowed, int64_t begin, int64_t end) {
    constexpr int COUNT = Lanes<T>::COUNT;
    const int64_t d = group.problem.d;
    const T *query = static_cast<const T*>(group.problem.query), *database = static_cast<const T*>(group.problem.database);
    typename Lanes<T>::Integers last;
    for (int l = 0; l < COUNT; ++l) last[l] = d < COUNT || l >= COUNT - d % COUNT ? -1 : 0;
    const bool together = transposes(group.size, d);
    Several<T> several(query, together ? group.size : 0, d);
    int64_t rows[COUNT];
    const T* row[COUNT];
    alignas(64) int32_t keys[LANES];
    std::fill(keys, keys + LANES, std::numeric_limits<int32_t>::max());
    for (int64_t first = begin; first < end; first += COUNT) {
        const int64_t count = std::min<int64_t>(COUNT, end - first);
        for (int64_t l = 0; l < COUNT; ++l) {
            const int64_t position = first + std::min(l, count - 1);
            rows[l] = allowed ? allowed[position] : position;
            row[l] = database + rows[l] * d;
        }
        if (together) several.measure(row);
        for (int64_t slot = 0; slot < group.size; ++slot) {
            if (together) several.keys(slot, keys);
            else distance_bits(query + slot * d, row, d, last, keys);
            if (slot == 0) {
                bool finite = true;
                for (int l = 0; l < COUNT; ++l) finite &= uint32_t(keys[l]) < uint32_t(INFINITE);
                for (int64_t l = 0; !finite && l < count; ++l)  // finite rows may be too far for float32
                    for (int64_t t = 0; t < d; ++t)
                        if (!std::isfinite(row[l][t])) return rows[l];
            }
            AnyAtMost hit;
            hit.add(*(const ints*)keys, splat(group.limit[slot]));
            if (__builtin_expect(hit.any(), 0)) group.take(slot, keys, rows, count);
        }
    }
    return -1;
}

template <class T>
static Kernels<T> kernels() {
    return {ROWS, WIDTH, LANES, &filter, &norms<T>, &pack_panels<T>, &pack_query<T>, &scan<T>};
}
