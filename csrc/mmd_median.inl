// The rank-th largest squared distance by its bits, from the top: distances are not negative, so their bit patterns are
// ordered as they are. Each round counts, among the distances that share the bits found so far, what comes next; few
// pairs are kept, many are computed anew in every round.
//
// A distance is Σ_c (x_c − y_c)² in float64, coordinate after coordinate, rounded once to T.

template <class T>
struct Median {
    typedef double V __attribute__((vector_size(VEC_BYTES)));
    typedef double Loose __attribute__((vector_size(VEC_BYTES), aligned(8)));  // in memory
    using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    static constexpr int lanes = VEC_BYTES / sizeof(double);
    static constexpr int strip = VEC_BYTES == 64 ? 8 : 4;  // rows of the register block; its columns are two vectors
    static constexpr int panel = 2 * lanes;
    static constexpr int64_t block_rows = 64, block_columns = 256;
    static constexpr int64_t keep = 1 << 18;  // pairs
    static constexpr Key sign = Key(1) << (8 * sizeof(T) - 1);

    struct Counts {
        std::vector<int64_t> bin, first;  // of each next few bits: how many pairs, and the first of them
        bool bad = false;
    };

    const MedianArguments<T>& a;
    const int64_t blocks;
    std::vector<double> rows, panels;  // x by rows; y in panels of columns, padded with zeros
    std::vector<T> kept;

    explicit Median(const MedianArguments<T>& arguments)
        : a(arguments),
          blocks((a.n + block_rows - 1) / block_rows),
          rows((a.n + strip - 1) / strip * strip * a.d),
          panels((a.m + panel - 1) / panel * panel * a.d) {
        std::copy(a.x, a.x + a.n * a.d, rows.begin());
        for (int64_t j = 0; j < a.m; ++j)
            for (int64_t c = 0; c < a.d; ++c) panels[(j / panel * a.d + c) * panel + j % panel] = a.y[j * a.d + c];
        if (a.n * a.m <= keep) kept.resize(a.n * a.m);
    }

    // The distances of rows i … i + strip − 1 to columns j … j + panel − 1.
    void distances(int64_t i, int64_t j, T (*out)[panel]) const {
        const double *x = rows.data() + i * a.d, *y = panels.data() + j * a.d;
        V sums[strip][2] = {};
        for (int64_t c = 0; c < a.d; ++c) {
            const V low = *(const Loose*)(y + c * panel), high = *(const Loose*)(y + c * panel + lanes);
            for (int r = 0; r < strip; ++r) {
                const V l = x[r * a.d + c] - low, h = x[r * a.d + c] - high;
                sums[r][0] += l * l;
                sums[r][1] += h * h;
            }
        }
        for (int r = 0; r < strip; ++r)
            for (int l = 0; l < panel; ++l) out[r][l] = T(sums[r][l / lanes][l % lanes]);
    }

    // visit(row i, its first column j0, distances, how many) for every pair that counts of one block of rows.
    template <class Visit>
    void block(int64_t which, Visit&& visit) const {
        const int64_t first = which * block_rows, last = std::min(a.n, first + block_rows);
        T tile[strip][panel];
        for (int64_t start = a.same ? first / panel * panel : 0; start < a.m; start += block_columns)
            for (int64_t i = first; i < last; i += strip)
                for (int64_t j = start; j < std::min(a.m, start + block_columns); j += panel) {
                    if (a.same && j + panel <= i + 1) continue;
                    distances(i, j, tile);
                    for (int64_t r = 0; r < std::min<int64_t>(strip, last - i); ++r) {
                        const int64_t skip = a.same ? std::max<int64_t>(0, i + r + 1 - j) : 0;
                        const int64_t end = std::min<int64_t>(panel, a.m - j);
                        if (skip < end) visit(i + r, j + skip, tile[r] + skip, end - skip);
                    }
                }
    }

    // Counts one block's distances that have `found` in the bits above `high` by their bits high − 1 … shift.
    void count(int64_t which, Key found, int high, int shift, bool want_first, Counts& counts) const {
        const Key mask = high - shift == 8 * sizeof(T) ? ~Key(0) : (Key(1) << (high - shift)) - 1;
        constexpr Key infinity = sizeof(T) == 4 ? Key(0x7f800000u) : Key(0x7ff0000000000000ull);
        auto visit = [&](int64_t i, int64_t j, const T* d, int64_t n) {
            for (int64_t l = 0; l < n; ++l) {
                Key key;
                std::memcpy(&key, d + l, sizeof(key));
                key &= ~sign;  // NaN's may be set
                counts.bad |= key >= infinity;
                if (key >> high != found >> high) continue;
                const Key bin = key >> shift & mask;
                ++counts.bin[bin];
                if (want_first) counts.first[bin] = std::min(counts.first[bin], i * a.m + j + l);
            }
        };
        if (kept.empty()) return block(which, visit);
        const int64_t end = std::min(a.n, (which + 1) * block_rows);
        for (int64_t i = which * block_rows; i < end; ++i) {
            const int64_t skip = a.same ? i + 1 : 0;
            visit(i, skip, kept.data() + i * a.m + skip, a.m - skip);
        }
    }

    void run() {
        const int64_t work = a.n * a.m * (a.d + 8);
        const int threads = work < 1 << 20 ? 1 : int(std::min<int64_t>(a.threads, blocks));
        if (!kept.empty()) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
            for (int64_t b = 0; b < blocks; ++b)
                block(b, [&](int64_t i, int64_t j, const T* d, int64_t n) { std::copy(d, d + n, &kept[i * a.m + j]); });
        }
        const int width = kept.empty() ? 16 : 11;  // fewer rounds, or histograms that few pairs are worth
        Key found = 0;
        int64_t rank = a.rank, first = 0;
        std::vector<Counts> each(threads);
        for (int high = 8 * sizeof(T) - 1; high > 0;) {
            const int shift = std::max(0, high - width);
            const int64_t bins = int64_t(1) << (high - shift);
            for (Counts& c : each) {
                c.bin.assign(bins, 0);
                if (shift == 0) c.first.assign(bins, std::numeric_limits<int64_t>::max());
            }
#pragma omp parallel num_threads(threads)
            {
                Counts& own = each[thread_number()];
#pragma omp for schedule(dynamic, 1)
                for (int64_t b = 0; b < blocks; ++b) count(b, found, high, shift, shift == 0, own);
            }
            for (int64_t bin = bins; bin-- > 0;) {
                int64_t here = 0;
                for (const Counts& c : each) here += c.bin[bin];
                if (rank > here) {
                    rank -= here;
                    continue;
                }
                found |= Key(bin) << shift;
                if (shift == 0) {
                    first = std::numeric_limits<int64_t>::max();
                    for (const Counts& c : each) first = std::min(first, c.first[bin]);
                }
                break;
            }
            if (std::any_of(each.begin(), each.end(), [](const Counts& c) { return c.bad; })) {
                *a.value = std::numeric_limits<T>::quiet_NaN();
                a.pair[0] = a.pair[1] = 0;
                return;
            }
            high = shift;
        }
        std::memcpy(a.value, &found, sizeof(found));
        a.pair[0] = first / a.m;
        a.pair[1] = first % a.m;
    }

    static int thread_number() {
#ifdef _OPENMP
        return omp_get_thread_num();
#else
        return 0;
#endif
    }
};

template <class T>
void median_of(const MedianArguments<T>& arguments) {
    Median<T>(arguments).run();
}
