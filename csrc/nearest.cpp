// Exact nearest neighbours: a filter in 16-bit integers that cannot lose the answer, then direct distances in float64.
//
// With c any point (here about the mean), q' = q − c, b' = b − c:  ‖q − b‖² = ‖q'‖² + 2 (‖b'‖²/2 − q'·b').
// Scales s, t and integers q̂ = round(q'/s), b̂ = round(b'/t) give the key  κ(b) = round(‖b'‖²/2st) − q̂·b̂, an exact 32-bit
// integer. q'·b'/st − q̂·b̂ = δq·b̂ + (q'/s)·δb, with δ what rounding took away, so by Cauchy and Schwarz
//     |κ − (‖b'‖²/2 − q'·b')/st| ≤ E(q) = ‖δq‖ (max‖b'‖/t + max‖δb‖) + ‖q'‖/s max‖δb‖ + 2 + what rounds here,
// with ‖δ‖ as it was measured, not its worst case. So a row whose key exceeds the k-th smallest by more than 2 E is farther
// than k others, float32 rounding of the distances included, and every other row is kept as a candidate: the answer does
// not depend on c, s, t, the order or the threads, which only decide how many candidates there are (a few).
// Once the direct distance of k candidates is known, it gives a limit too. A list that fills up is measured and emptied,
// so ties without number cost time, never memory or correctness. One scale would serve badly where some norms are far
// above the others: rows and queries go in buckets of norm, each pair of buckets with scales of its own.
//
// A rejection radius sets a second limit, `near`: rows with keys at or below it may lie within the radius, so that all of
// them are measured whatever the first limit says, and none of them lowers it before it is measured.
//
// Few queries do not pay for packing the database. They read it once as it is, and their keys are the bits of a float32
// distance, summed straightforwardly from (q − b)²: floats that are not negative are ordered as their bits are, and the
// sum's error is relative, which in bits is one number. What follows is the same. From six queries on the rows that a
// scan reads are transposed, a vector's worth at a time, so that no lanes are left to add up for each query.
#include "nearest.h"
#include "nearest_direct.h"
#include "pages.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTGEN_X86
#include <immintrin.h>
#endif

namespace fastgen {
namespace {

#include "nearest_candidates.inl"

constexpr int64_t PANEL_BYTES = 384 << 10;  // of the database at a time: within a core's second-level cache
constexpr double STEPS = 32700;  // the largest norm in units of its scale: 1.5·STEPS² < 2^31, every coordinate < 2^15
constexpr int64_t BUCKETS = 64;
constexpr float TINY = 0x1p-80f;  // below it a sum may have lost whole squares, be it 2^20 that were flushed to zero
constexpr int32_t INFINITE = 0x7f800000;
constexpr int TOGETHER = 8;  // queries of a scan at a time, where it transposes the rows that it reads
constexpr int64_t DEEP = 128;  // coordinates summed one after the other then

bool transposes(int64_t n, int64_t d) { return n >= 6 && n * d <= 1 << 20; }  // pays from six on, in some MB a thread

int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

struct Database {  // one bucket, packed
    int64_t size, pairs;
    const int32_t* packed;
    const int32_t* half;    // ‖b'‖²/2st; the columns that fill up the last panel never hit
    const int64_t* rows;    // position in the bucket -> row of the database
};

template <class T>
struct Kernels {
    int rows, width, floats;  // floats: in a vector
    void (*filter)(Group&, const Database&);
    void (*norms)(const T*, const int64_t*, int64_t, int64_t, int64_t, const T*, double*);
    double (*pack_panels)(const T*, const int64_t*, int64_t, int64_t, int64_t, const T*, T, int16_t*, int32_t*);
    double (*pack_query)(const T*, int64_t, int64_t, const T*, T, int16_t*, int32_t*);
    int64_t (*scan)(Group&, const int64_t*, int64_t, int64_t);
};

}  // namespace
}  // namespace fastgen

#define FASTGEN_BODY "nearest.inl"
#include "each_isa.h"

#ifdef FASTGEN_X86
#pragma GCC push_options
#pragma GCC target("avx512vnni,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#define VEC_BYTES 64
#define FASTGEN_VNNI
namespace fastgen::avx512vnni {
#include "nearest.inl"
}
#undef FASTGEN_VNNI
#undef VEC_BYTES
#pragma GCC pop_options
#endif

namespace fastgen {
namespace {

template <class T>
Kernels<T> choose(bool vnni) {
#ifdef FASTGEN_X86
    if (vnni && isa() == Isa::avx512 && __builtin_cpu_supports("avx512vnni")) return avx512vnni::kernels<T>();
#endif
    return FASTGEN_DISPATCH(kernels<T>);
}

// Positions grouped by norm: the first bucket to `edge`, each further one to eight times the last's edge.
struct Buckets {
    std::vector<int64_t> order, start;  // bucket i holds order[start[i]] … order[start[i + 1]]

    Buckets(const std::vector<double>& squares, double edge) : order(squares.size()), start(BUCKETS + 1, 0) {
        std::vector<uint8_t> bucket(squares.size());
        for (size_t i = 0; i < squares.size(); ++i) {
            int found = 0;
            for (double top = edge; squares[i] > top * top && found < BUCKETS - 1; top *= 8) ++found;
            bucket[i] = uint8_t(found);
            ++start[found + 1];
        }
        std::partial_sum(start.begin(), start.end(), start.begin());
        std::vector<int64_t> next(start);
        for (size_t i = 0; i < squares.size(); ++i) order[next[bucket[i]]++] = int64_t(i);
    }
};

double eight_medians(const std::vector<double>& squares) {
    std::vector<double> sample;
    for (size_t i = 0, step = squares.size() / 1024 + 1; i < squares.size(); i += step) sample.push_back(squares[i]);
    std::nth_element(sample.begin(), sample.begin() + sample.size() / 2, sample.end());
    const double median = std::sqrt(sample[sample.size() / 2]);
    return median > 0 ? 8 * median : std::numeric_limits<double>::infinity();
}

// The mean of some of the rows that may be chosen, of which the far ones are left out: any centre is right, but one that
// a few outliers have dragged away leaves many candidates.
template <class T>
std::vector<T> about_the_mean(const T* database, const std::vector<int64_t>& allowed, int64_t d, const Kernels<T>& kernel) {
    std::vector<int64_t> rows;
    for (size_t i = 0; i < allowed.size(); i += allowed.size() / 256 + 1) rows.push_back(allowed[i]);
    const int64_t samples = int64_t(rows.size());
    std::vector<double> sum(d), square(samples, 0), sorted;
    std::vector<T> centre(d);
    double most = 0;
    for (int round = 0; round < 3; ++round) {
        std::fill(sum.begin(), sum.end(), 0);
        int64_t kept = 0;
        for (int64_t i = 0; i < samples; ++i) {
            if (!(square[i] <= most)) continue;
            ++kept;
            for (int64_t t = 0; t < d; ++t) sum[t] += database[rows[i] * d + t];
        }
        for (int64_t t = 0; t < d; ++t) {
            centre[t] = T(sum[t] / std::max<int64_t>(kept, 1));
            if (!std::isfinite(centre[t])) centre[t] = 0;  // a row that is not finite is found below
        }
        kernel.norms(database, rows.data(), 0, samples, d, centre.data(), square.data());
        for (double& each : square)
            if (std::isnan(each)) each = std::numeric_limits<double>::infinity();  // NaN does not sort
        sorted = square;
        std::nth_element(sorted.begin(), sorted.begin() + samples / 2, sorted.end());
        most = 16 * sorted[samples / 2];
    }
    return centre;
}

NearestStatus within_float32(const NearestProblem& problem) {
    for (int64_t i = 0; i < problem.n * problem.k; ++i)
        if (!std::isfinite(problem.distance[i])) return {NearestStatus::overflow, 0};
    return {NearestStatus::ok, 0};
}

template <class T>
NearestStatus every_pair(const NearestProblem& problem, const std::vector<int64_t>& allowed, int threads) {
    std::vector<int64_t> measured(problem.n, 0);
#pragma omp parallel num_threads(threads)
    {
        Group group(problem, 1, 0, measured.data());
        group.limit[0] = ALWAYS, group.near[0] = NEVER, group.count[0] = 0;
        group.norm[0] = 0, group.unit[0] = 1, group.error[0] = std::numeric_limits<double>::infinity();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < problem.n; ++i) {
            group.query_rows = &i;
            const uint8_t* mask = problem.mask_stride ? problem.mask + i * problem.mask_stride : nullptr;
            for (const int64_t row : allowed) {
                if (mask && !mask[row]) continue;
                if (group.count[0] == group.capacity) group.measure(0);
                group.list[group.count[0]++] = {NEVER, row};
            }
            group.measure(0);
        }
    }
    return within_float32(problem);
}

// The rows that some query may choose.
std::vector<int64_t> allowed_rows(const NearestProblem& problem) {
    std::vector<int64_t> allowed(problem.m);
    if (problem.mask == nullptr) {
        std::iota(allowed.begin(), allowed.end(), 0);
        return allowed;
    }
    int64_t found = 0;
    for (int64_t j = 0; j < problem.m; ++j) {
        bool any = false;
        for (int64_t i = 0; i < (problem.mask_stride ? problem.n : 1) && !any; ++i) any = problem.mask[i * problem.m + j];
        if (any) allowed[found++] = j;
    }
    allowed.resize(found);
    return allowed;
}

// Each thread scans its part of the database for all queries; the k best of each part are merged.
template <class T>
NearestStatus scan(const NearestProblem& problem, const Kernels<T>& kernel, int threads) {
    const int64_t n = problem.n, d = problem.d, k = problem.k;
    const T* query = static_cast<const T*>(problem.query);
    for (int64_t i = 0; i < n * d; ++i)
        if (!std::isfinite(query[i])) return {NearestStatus::query_not_finite, i / d};
    const std::vector<int64_t> allowed = problem.mask ? allowed_rows(problem) : std::vector<int64_t>();
    const int64_t size = problem.mask ? int64_t(allowed.size()) : problem.m;

    // Of a float sum: two roundings a step and its square, one a sum; and float32 of the result.
    const double each = transposes(n, d) ? double(std::min(d, DEEP) + d / DEEP) : double(d) / kernel.floats;
    const double sums = each + 10, error = 2 + 1.1 * (sizeof(T) == 4 ? sums + 1 : 3);
    std::vector<int64_t> order(n), index(threads * n * k), measured(threads * n, 0), bad(threads, -1);
    std::vector<float> distance(threads * n * k);
    std::iota(order.begin(), order.end(), 0);
    std::vector<NearestProblem> parts(threads, problem);
    std::vector<Group> groups;
    groups.reserve(threads);
    for (int thread = 0; thread < threads; ++thread) {
        parts[thread].index = index.data() + thread * n * k, parts[thread].distance = distance.data() + thread * n * k;
        Group& group = groups.emplace_back(parts[thread], n, 0, measured.data() + thread * n);
        group.query_rows = order.data(), group.size = n, group.least = bits(TINY);
        for (int64_t slot = 0; slot < n; ++slot) {
            group.count[slot] = 0, group.limit[slot] = ALWAYS;
            group.unit[slot] = group.norm[slot] = 0, group.error[slot] = error;
            group.near[slot] = problem.rejected ? std::min(double(ALWAYS), bits(float(problem.reach)) + error) : NEVER;
        }
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        Group& group = groups[thread];
        bad[thread] = kernel.scan(group, problem.mask ? allowed.data() : nullptr, size * thread / threads,
                                  size * (thread + 1) / threads);
        for (int64_t slot = 0; slot < n && bad[thread] < 0; ++slot) {
            group.prune(slot);
            group.measure(slot);
        }
    }
    for (const int64_t row : bad)
        if (row >= 0) return {NearestStatus::database_not_finite, row};
    std::vector<std::pair<float, int64_t>> found;
    for (int64_t i = 0; i < n; ++i) {
        found.clear();
        for (int thread = 0; thread < threads; ++thread)
            for (int64_t j = (thread * n + i) * k; j < (thread * n + i) * k + measured[thread * n + i]; ++j)
                found.emplace_back(distance[j], index[j]);
        std::sort(found.begin(), found.end());
        for (int64_t j = 0; j < std::min(k, int64_t(found.size())); ++j)
            problem.distance[i * k + j] = found[j].first, problem.index[i * k + j] = found[j].second;
    }
    return within_float32(problem);
}

template <class T>
NearestStatus run(const NearestProblem& problem) {
    const int64_t n = problem.n, m = problem.m, d = problem.d, pairs = (d + 1) / 2;
    const T *query = static_cast<const T*>(problem.query), *database = static_cast<const T*>(problem.database);
    const Kernels<T> kernel = choose<T>(problem.vnni);
    const int threads = double(n) * m * d < 1 << 18 ? 1 : problem.threads;
    // Up to there packing costs more: with threads all the more, for it is not all done by all of them.
    const int64_t few = problem.few * kernel.floats / (sizeof(T) == 4 ? 16 : 48) / (threads > 1 ? 1 : 2);
    if (n <= few && !problem.every_pair) return scan<T>(problem, kernel, threads);
    const std::vector<int64_t> allowed = allowed_rows(problem);
    const int64_t size = int64_t(allowed.size());

    const std::vector<T> centre = about_the_mean(database, allowed, d, kernel);
    std::vector<double> query_norm(n), norm(size);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < (n + 63) / 64; ++i)
            kernel.norms(query, nullptr, i * 64, std::min(n, i * 64 + 64), d, centre.data(), query_norm.data());
#pragma omp for schedule(static)
        for (int64_t j = 0; j < (size + 63) / 64; ++j)
            kernel.norms(database, allowed.data(), j * 64, std::min(size, j * 64 + 64), d, centre.data(), norm.data());
    }
    const double largest = sizeof(T) == 4 ? 1e80 : 1e280;
    bool overflow = false;
    auto refuse = [&](const std::vector<double>& squares, const T* x, const int64_t* rows) -> int64_t {
        for (size_t i = 0; i < squares.size(); ++i) {
            if (squares[i] <= largest) continue;
            const int64_t row = rows ? rows[i] : int64_t(i);
            for (int64_t t = 0; t < d; ++t)
                if (!std::isfinite(x[row * d + t])) return row;
            overflow = true;
        }
        return -1;
    };
    if (const int64_t row = refuse(query_norm, query, nullptr); row >= 0) return {NearestStatus::query_not_finite, row};
    if (const int64_t row = refuse(norm, database, allowed.data()); row >= 0) return {NearestStatus::database_not_finite, row};
    if (overflow) return {NearestStatus::overflow, 0};

    if (problem.every_pair) return every_pair<T>(problem, allowed, threads);
    const Buckets buckets(norm, eight_medians(norm));
    const Buckets query_buckets(query_norm, eight_medians(query_norm));
    std::vector<int64_t> measured(n, 0);
    const int64_t tiles = (n + kernel.rows - 1) / kernel.rows;
    const int64_t group_rows = kernel.rows * std::min<int64_t>(16, (tiles + 4 * threads - 1) / (4 * threads));
    std::vector<Group> groups;
    groups.reserve(threads);
    for (int i = 0; i < threads; ++i) groups.emplace_back(problem, group_rows, pairs, measured.data());

    const int64_t panels_most = (size + kernel.width - 1) / kernel.width;
    Aligned<int32_t> packed(panels_most * kernel.width * pairs), half(panels_most * kernel.width);
    std::vector<int64_t> rows(size);
    for (int64_t b = 0; b < BUCKETS; ++b) {
        const int64_t *chosen = buckets.order.data() + buckets.start[b], count = buckets.start[b + 1] - buckets.start[b];
        if (count == 0) continue;
        double radius = 0;
        for (int64_t j = 0; j < count; ++j) radius = std::max(radius, norm[chosen[j]]), rows[j] = allowed[chosen[j]];
        radius = std::sqrt(radius);
        const double floor = sizeof(T) == 4 ? 1e-30 : 1e-140, scale = std::max(radius / STEPS, floor);
        const int64_t panels = (count + kernel.width - 1) / kernel.width;
        std::fill(packed + (panels - 1) * kernel.width * pairs, packed + panels * kernel.width * pairs, 0);
        double loss = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : loss)
        for (int thread = 0; thread < threads; ++thread) {
            const int64_t from = std::min(count, panels * thread / threads * kernel.width);
            const int64_t to = std::min(count, panels * (thread + 1) / threads * kernel.width);
            loss = std::max(loss, kernel.pack_panels(database, rows.data(), from, to, d, centre.data(), T(1 / scale),
                                                     groups[thread].line, packed));
        }
        // Centring, the scale and scaling by it each round by 2^-24 of at most STEPS; the sum of squares by d/16 of that.
        const double inexact = 0.006, summed = 1.001 + 4e-9 * d;
        loss = loss * summed + inexact;

        for (int64_t a = 0; a < BUCKETS; ++a) {
            const int64_t *asked = query_buckets.order.data() + query_buckets.start[a];
            const int64_t number = query_buckets.start[a + 1] - query_buckets.start[a];
            if (number == 0) continue;
            double query_radius = 0;
            for (int64_t i = 0; i < number; ++i) query_radius = std::max(query_radius, query_norm[asked[i]]);
            const double query_scale = std::max(std::max(std::sqrt(query_radius), radius) / STEPS, floor);
            const double unit = 2 * query_scale * scale;
            for (int64_t j = 0; j < panels * kernel.width; ++j)
                half[j] = j < count ? int32_t(std::nearbyint(norm[chosen[j]] / unit)) : std::numeric_limits<int32_t>::max();
            const Database bucket{count, pairs, packed, half, rows.data()};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
            for (int64_t first = 0; first < number; first += group_rows) {
                Group& group = groups[thread_number()];
                group.query_rows = asked + first;
                const int64_t live = std::min(group_rows, number - first);
                group.size = (live + kernel.rows - 1) / kernel.rows * kernel.rows;
                for (int64_t slot = 0; slot < group.size; ++slot) {
                    group.count[slot] = 0;
                    group.limit[slot] = slot < live ? ALWAYS : NEVER;
                    group.near[slot] = NEVER;
                    if (slot >= live) continue;  // its integers are zero or another query's: no key is at or below NEVER
                    const int64_t row = asked[first + slot];
                    const double length = std::sqrt(query_norm[row]);
                    const double lost = inexact + summed * kernel.pack_query(query + row * d, slot, d, centre.data(),
                                                                             T(1 / query_scale), group.line, group.packed);
                    group.norm[slot] = query_norm[row];
                    group.unit[slot] = unit;
                    group.error[slot] = lost * (radius / scale + loss) + length / query_scale * loss + 2 +
                                        (0x1p-20 * (length + radius) * (length + radius) + 0x1p-148) / unit;
                    if (problem.rejected) {
                        const double key = (problem.reach - query_norm[row]) / unit + group.error[slot];
                        group.near[slot] = int32_t(std::ceil(std::min(std::max(key, double(NEVER)), double(ALWAYS))));
                    }
                    group.limit_by_measured(slot);
                }
                kernel.filter(group, bucket);
                for (int64_t slot = 0; slot < live; ++slot) {
                    group.prune(slot);
                    group.measure(slot);
                }
            }
        }
    }
    return within_float32(problem);
}

template <class T>
void distances(const NearestProblem& problem) {
    const int64_t d = problem.d, k = problem.k;
    const T *query = static_cast<const T*>(problem.query), *database = static_cast<const T*>(problem.database);
    const int threads = double(problem.n) * k * d < 1 << 16 ? 1 : problem.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < problem.n * k; ++i)
        problem.distance[i] = direct(query + i / k * d, database + problem.index[i] * d, d);
}

}  // namespace

NearestStatus nearest(const NearestProblem& problem) { return problem.is_double ? run<double>(problem) : run<float>(problem); }

void nearest_distance(const NearestProblem& problem) {
    problem.is_double ? distances<double>(problem) : distances<float>(problem);
}

}  // namespace fastgen
