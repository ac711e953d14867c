// The update, one instruction set's copy of it. A block's noise is made into a buffer that stays in the first-level cache,
// then the update runs over the block. Every element is computed alone: no result depends on the partition.
#include "philox.inl"

constexpr int64_t BLOCK = 4096;  // elements

constexpr int SPARE = 8 * LANES;  // room behind a buffer of noise: two batches are written at a time

// What the update will read: fetched while the noise is made, which leaves the memory idle.
struct Ahead {
    const char *x, *grad;
    int64_t bytes, size;  // of all elements, and of one

    // Of s, elements from `first` on; noise alone reads nothing.
    Ahead(const LangevinStep& s, int64_t first, int64_t count)
        : x(nullptr), grad(nullptr), bytes(0), size(bytes_of(s.type)) {
        if (s.grad == nullptr) return;
        x = static_cast<const char*>(s.x) + first * size, grad = static_cast<const char*>(s.grad) + first * size;
        bytes = count * size;
    }

    void fetch(int64_t first, int64_t count) const {
        for (int64_t at = first * size; at < std::min(bytes, (first + count) * size); at += 64) {
            __builtin_prefetch(x + at, 1, 3);
            __builtin_prefetch(grad + at, 0, 3);
        }
    }
};

// Normals of elements [first, first + count) of one chain; first is a multiple of 4.
static void fill_chain(float* out, int64_t first, int64_t count, uint64_t chain, uint32_t step, const Keys& keys,
                       const Ahead& ahead) {
    u32v group;
    for (int i = 0; i < LANES; ++i) group[lane_of(i)] = uint32_t(first / 4 + i);
    const u32v c1 = u32v{} + step, c2 = u32v{} + uint32_t(chain), c3 = u32v{} + uint32_t(chain >> 32);
    for (int64_t i = 0; i < count; i += 8 * LANES, group += 2 * uint32_t(LANES)) {
        ahead.fetch(i, 8 * LANES);
        u32v counter[2][4] = {{group, c1, c2, c3}, {group + uint32_t(LANES), c1, c2, c3}};
        normals(counter, keys, out + i);
    }
}

// Normals of whole chains, packed; before that each takes a multiple of 4.
static void fill_chains(float* out, const LangevinStep& s, int64_t first_chain, int64_t chains, const Keys& keys,
                        const Ahead& ahead) {
    const uint32_t groups = uint32_t((s.elements + 3) / 4), groups_on = LANES % groups, chains_on = LANES / groups;
    u32v group, chain;  // of the next batch; the last chain's lanes may run on into chains that are not there
    for (uint32_t i = 0, g = 0, c = 0; i < LANES; ++i) {
        group[lane_of(i)] = g, chain[lane_of(i)] = c;
        if (++g == groups) g = 0, ++c;
    }
    for (int64_t done = 0; done < chains * groups; done += 2 * LANES) {
        ahead.fetch(4 * done, 8 * LANES);
        u32v counter[2][4];
        for (auto& c : counter) {
            c[0] = group, c[1] = u32v{} + s.step;
            c[2] = chain + uint32_t(first_chain);
            c[3] = uint32_t(first_chain >> 32) - (u32v)(c[2] < chain);  // a true lane is −1
            const auto id = [&](int i) -> uint64_t {
                return s.chain_id[first_chain + std::min<int64_t>(chain[i], chains - 1)];
            };
            if (s.chain_id && chain[0] == chain[LANES - 1])
                c[2] = u32v{} + uint32_t(id(0)), c[3] = u32v{} + uint32_t(id(0) >> 32);
            else if (s.chain_id)
                for (int i = 0; i < LANES; ++i) c[2][i] = uint32_t(id(i)), c[3][i] = uint32_t(id(i) >> 32);
            group += groups_on;
            const u32v next = (u32v)(group >= groups);
            group -= next & groups;
            chain += chains_on - next;
        }
        normals(counter, keys, out + 4 * done);
    }
    if (s.elements % 4 != 0)
        for (int64_t c = 1; c < chains; ++c)
            for (int64_t i = 0; i < s.elements; ++i) out[c * s.elements + i] = out[c * 4 * int64_t(groups) + i];
}

template <class To, class From>
static inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

struct Bfloat16 {
    uint16_t raw;
};
struct Float16 {
    uint16_t raw;
};

static inline float load(float x) { return x; }
static inline double load(double x) { return x; }
static inline float load(Bfloat16 x) { return bits<float>(uint32_t(x.raw) << 16); }
static inline float load(Float16 x) {
    const uint32_t magnitude = (x.raw & 0x7fffu) << 13, sign = (x.raw & 0x8000u) << 16;
    const float finite = bits<float>(magnitude) * 0x1p112f;  // exact, subnormals among them
    const uint32_t infinite = magnitude | 0x7f800000u;
    return bits<float>((magnitude >= 0x0f800000u ? infinite : bits<uint32_t>(finite)) | sign);
}

static inline void store(float& to, float x) { to = x; }
static inline void store(double& to, double x) { to = x; }
static inline void store(Bfloat16& to, float x) {  // to nearest even
    const uint32_t b = bits<uint32_t>(x);
    to.raw = uint16_t(x == x ? (b + 0x7fffu + (b >> 16 & 1u)) >> 16 : b >> 16 | 0x40u);
}
static inline void store(Float16& to, float x) {  // to nearest even
    const uint32_t b = bits<uint32_t>(x), sign = b >> 16 & 0x8000u, magnitude = b & 0x7fffffffu;
    // Adding ½ leaves the subnormal's 10 bits, rounded, at the bottom of the sum.
    const uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    to.raw = uint16_t(sign | (magnitude >= 0x47800000u ? large : magnitude < 0x38800000u ? subnormal : normal));
}

template <class Real>
struct Scalars {
    Real step_size, noise_scale, precision, clip, low, high, first_low, first_high, lookahead;
};

template <class Real>
static inline Real bound(Real x, Real low, Real high) {  // NaN stays
    x = x < low ? low : x;
    return x > high ? high : x;
}

template <bool PRIOR, class Real>
static inline Real drift(Real x, Real g, const Scalars<Real>& k) {
    g = bound(g, -k.clip, k.clip);
    return PRIOR ? g + x * k.precision : g;
}

// What a block adds to its chain's statistics: Σ grad², elements that a clamp moved, elements not finite.
struct Tally {
    double squares;
    int64_t clamped, wrong;
};

template <bool PRIOR, bool NOISE, bool STATS, class T, class Real>
static void update(T* __restrict x, const T* grad, const float* __restrict noise, int64_t count, Scalars<Real> k,
                   Tally* tally) {
    using Count = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;
    Count clamped = 0, wrong = 0;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
        const Real before = load(x[i]);
        const Real moved = before - k.step_size * drift<PRIOR>(before, Real(load(grad[i])), k);
        Real y = bound(moved, k.first_low, k.first_high);
        if (NOISE) y = y + k.noise_scale * Real(noise[i]);
        T out;
        store(out, bound(y, k.low, k.high));
        if (STATS) {
            clamped += (moved < k.first_low) | (moved > k.first_high) | (y < k.low) | (y > k.high);
            Real zero = (moved - moved) + (y - y);  // else NaN
            if (sizeof(T) == 2) zero = zero + (Real(load(out)) - Real(load(out)));  // may overflow where y does not
            wrong += !(zero == 0);
        }
        x[i] = out;
    }
    if (STATS) tally->clamped = clamped, tally->wrong = wrong;
}

// Sums in SUMS lanes, whatever the instruction set: the same bits from each.
constexpr int SUMS = 32;

static double total(const double (&lane)[SUMS]) {
    double sum[SUMS];
    std::memcpy(sum, lane, sizeof sum);
    for (int half = SUMS / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sum[i] = sum[i] + sum[i + half];
    return sum[0];
}

template <class T>
static double squares(const T* grad, int64_t count) {
    double lane[SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS <= count; i += SUMS)
        for (int j = 0; j < SUMS; ++j) {
            const double g = load(grad[i + j]);
            lane[j] += g * g;
        }
    for (int j = 0; i + j < count; ++j) {
        const double g = load(grad[i + j]);
        lane[j] += g * g;
    }
    return total(lane);
}

template <class T, class Real>
static void block(const LangevinStep& s, int64_t offset, int64_t count, const float* noise, const Scalars<Real>& k,
                  Tally* tally) {
    T* x = static_cast<T*>(s.x) + offset;
    if (s.grad == nullptr) {
        for (int64_t i = 0; i < count; ++i) store(x[i], Real(noise[i]));
        return;
    }
    const T* grad = static_cast<const T*>(s.grad) + offset;
    const bool prior = s.precision != 0;
    if (s.lookahead != nullptr) {
        T* out = static_cast<T*>(s.lookahead) + offset;
        for (int64_t i = 0; i < count; ++i) {
            const Real before = load(x[i]), g = load(grad[i]);
            store(out[i], before - k.lookahead * (prior ? drift<true>(before, g, k) : drift<false>(before, g, k)));
        }
    }
    if (tally != nullptr) {
        tally->squares = squares(grad, count);
        if (prior)
            noise ? update<true, true, true>(x, grad, noise, count, k, tally)
                  : update<true, false, true>(x, grad, noise, count, k, tally);
        else
            noise ? update<false, true, true>(x, grad, noise, count, k, tally)
                  : update<false, false, true>(x, grad, noise, count, k, tally);
    } else if (prior)
        noise ? update<true, true, false>(x, grad, noise, count, k, tally)
              : update<true, false, false>(x, grad, noise, count, k, tally);
    else
        noise ? update<false, true, false>(x, grad, noise, count, k, tally)
              : update<false, false, false>(x, grad, noise, count, k, tally);
}

// Long chains are cut into blocks; short ones are put together, so that the lanes of a batch are full.
static bool is_cut(const LangevinStep& s) { return s.elements >= BLOCK / 4; }
static int64_t pieces_of(const LangevinStep& s) { return is_cut(s) ? (s.elements + BLOCK - 1) / BLOCK : 1; }

// body(first chain, chains, piece, offset within the chain, elements of each chain, noise or null)
template <class Body>
static void partition(const LangevinStep& s, bool noisy, const Body& body) {
    const Keys keys(s.seed);
    const bool cut = is_cut(s);
    const int64_t together = cut ? 1 : BLOCK / ((s.elements + 3) / 4 * 4), pieces = pieces_of(s);
    const int64_t tasks = (s.chains + together - 1) / together * pieces;
#pragma omp parallel for schedule(static) num_threads(s.threads) if (s.chains * s.elements > 32768)
    for (int64_t task = 0; task < tasks; ++task) {
        alignas(64) float noise[BLOCK + SPARE];
        if (cut) {
            const int64_t chain = task / pieces, first = task % pieces * BLOCK;
            const int64_t count = std::min(BLOCK, s.elements - first);
            const Ahead ahead(s, chain * s.elements + first, count);
            if (noisy) fill_chain(noise, first, count, s.chain_id ? s.chain_id[chain] : chain, s.step, keys, ahead);
            body(chain, 1, task % pieces, first, count, noisy ? noise : nullptr);
        } else {
            const int64_t chain = task * together, chains = std::min(together, s.chains - chain);
            const Ahead ahead(s, chain * s.elements, chains * s.elements);
            if (noisy) fill_chains(noise, s, chain, chains, keys, ahead);
            body(chain, chains, 0, 0, s.elements, noisy ? noise : nullptr);
        }
    }
}

template <class T, class Real>
static void run(const LangevinStep& s) {
    constexpr Real inf = std::numeric_limits<Real>::infinity();
    const Scalars<Real> scalars{Real(s.step_size), Real(s.noise_scale), Real(s.precision), Real(s.grad_clip), Real(s.low),
                                Real(s.high), s.noise_first ? Real(s.low) : -inf, s.noise_first ? Real(s.high) : inf,
                                Real(s.lookahead_size)};
    const auto of_chain = [&](int64_t chain) {
        Scalars<Real> k = scalars;
        if (s.step_sizes) k.step_size = static_cast<const Real*>(s.step_sizes)[chain];
        if (s.noise_scales) k.noise_scale = static_cast<const Real*>(s.noise_scales)[chain];
        return k;
    };
    const int64_t pieces = pieces_of(s);
    Tally* tallies = s.stats ? static_cast<Tally*>(std::malloc(s.chains * pieces * sizeof(Tally))) : nullptr;
    const bool apart = s.step_sizes || s.noise_scales || s.stats;  // chains that cannot go through as one
    const bool noisy = s.grad == nullptr || s.noise_scales != nullptr || s.noise_scale != 0;
    partition(s, noisy, [&](int64_t chain, int64_t chains, int64_t piece, int64_t first, int64_t count, const float* noise) {
        for (int64_t c = 0; c < (apart ? chains : 1); ++c)
            block<T>(s, (chain + c) * s.elements + first, apart ? count : chains * count,
                     noise ? noise + c * count : nullptr, of_chain(chain + c),
                     tallies ? tallies + (chain + c) * pieces + piece : nullptr);
    });
    for (int64_t chain = 0; tallies && chain < s.chains; ++chain) {
        Tally sum{};
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const Tally& t = tallies[chain * pieces + piece];
            sum.squares += t.squares, sum.clamped += t.clamped, sum.wrong += t.wrong;
        }
        double* out = s.stats + 3 * chain;
        out[0] = std::sqrt(sum.squares), out[1] = double(sum.clamped), out[2] = double(sum.wrong);
    }
    std::free(tallies);
}

void langevin(const LangevinStep& s) {
    switch (s.type) {
        case Type::float32: return run<float, float>(s);
        case Type::float64: return run<double, double>(s);
        case Type::bfloat16: return run<Bfloat16, float>(s);
        case Type::float16: return run<Float16, float>(s);
    }
}

// counter [count, 4] -> words [count, 4], for the known answers.
void philox_words(const uint32_t* counter, int64_t count, uint64_t seed, uint32_t* words) {
    const Keys keys(seed);
    for (int64_t i = 0; i < count; i += LANES) {
        u32v c[1][4]{};
        const int lanes = int(std::min<int64_t>(LANES, count - i));
        for (int lane = 0; lane < lanes; ++lane)
            for (int j = 0; j < 4; ++j) c[0][j][lane] = counter[4 * (i + lane) + j];
        philox(c, keys);
        for (int lane = 0; lane < lanes; ++lane)
            for (int j = 0; j < 4; ++j) words[4 * (i + lane) + j] = c[0][j][lane];
    }
}

#include "langevin_accept.inl"
