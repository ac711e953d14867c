// Vector arithmetic and the kernels of mmd.inl. A kernel gives k, in order 1 its slope and in order 2 its bend from
//   expanded, direct: u = ‖a − b‖²/base, w = −dk/du, expanded from norms or summed from the differences themselves (kernels
//                     of d: where d is near zero an expanded d² has no digit right);
//   inner:            u = ⟨a, b⟩/base, w = dk/du;
//   all:              e = d²k/du².
// A pair that is none (padding, an excluded diagonal) comes as a u of at least ±`none`: k, w and e are zero there. Kernels
// that do not vanish far away by themselves look for it.

#define FASTGEN_INLINE inline __attribute__((always_inline))
#define FASTGEN_INLINE_LAMBDA __attribute__((always_inline))

template <class T>
struct Lanes {
    static constexpr int count = VEC_BYTES / sizeof(T);
    using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef T V __attribute__((vector_size(VEC_BYTES)));
    typedef T Half __attribute__((vector_size(VEC_BYTES / 2)));
    typedef double D __attribute__((vector_size(VEC_BYTES)));
    typedef double HalfD __attribute__((vector_size(VEC_BYTES / 2)));
    using Wide = std::conditional_t<sizeof(T) == 4, D, HalfD>;  // of as many lanes as Half
    typedef Int I __attribute__((vector_size(VEC_BYTES)));
};

template <class T>
using Vec = typename Lanes<T>::V;

template <class T>
FASTGEN_INLINE Vec<T> splat(T s) {
    return Vec<T>{} + s;
}

enum Metric { expanded, direct, inner };

// Beyond any pair of points: −½‖z‖² of a point that is none, and from where on a pair is none.
template <class T>
constexpr T far = sizeof(T) == 4 ? T(1e35) : T(1e300);
template <class T>
constexpr T none = far<T> / 2;

// Half with half.
template <class T, int bytes = VEC_BYTES>
FASTGEN_INLINE double lane_sum(const void* of) {
    if constexpr (bytes == sizeof(T)) {
        return double(*static_cast<const T*>(of));
    } else {
        typedef T H __attribute__((vector_size(bytes / 2)));
        H low, high;
        std::memcpy(&low, of, sizeof(H));
        std::memcpy(&high, static_cast<const char*>(of) + sizeof(H), sizeof(H));
        low += high;
        return lane_sum<T, bytes / 2>(&low);
    }
}

// max(x, 0); NaN stays.
template <class T>
FASTGEN_INLINE Vec<T> at_least_zero(Vec<T> x) {
#if VEC_BYTES == 64
    if constexpr (std::is_same_v<T, float>)  // of a NaN and a number this one takes the second
        return (Vec<T>)__builtin_ia32_maxps512_mask(Vec<float>{}, (Vec<float>)x, Vec<float>{}, (unsigned short)-1, 4);
#endif
    return x < T(0) ? Vec<T>{} : x;
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

// √x and 1/√x for x ≥ 0, with 0 for 1/√0.
template <class T>
FASTGEN_INLINE Vec<T> root(Vec<T> x, Vec<T>& inverse) {
#if VEC_BYTES == 64
    if constexpr (std::is_same_v<T, float>) {
        const Vec<T> r = (Vec<T>)__builtin_ia32_rsqrt14ps512_mask((Vec<float>)x, Vec<float>{}, (unsigned short)-1);
        const Vec<T> refined = r * (T(1.5) - x * T(0.5) * r * r);
        inverse = x == T(0) ? Vec<T>{} : refined;
        return x * inverse;
    }
#endif
    Vec<T> d;
    for (int l = 0; l < Lanes<T>::count; ++l) d[l] = std::sqrt(x[l]);
    inverse = x == T(0) ? Vec<T>{} : T(1) / d;
    return d;
}

// log(x) for x ≥ 1: x = 2^n m with m about 1, log m = 2 artanh((m − 1)/(m + 1)). Infinity and NaN give NaN.
template <class T>
FASTGEN_INLINE Vec<T> log_above_one(Vec<T> x) {
    using I = typename Lanes<T>::I;
    constexpr bool single = std::is_same_v<T, float>;
    constexpr int mantissa = single ? 23 : 52, bias = single ? 127 : 1023, terms = single ? 5 : 11;
    const I one = (I)splat<T>(T(1)), fraction = ((I{} + 1) << mantissa) - 1;
    I n = ((I)x >> mantissa) - bias;
    Vec<T> m = (Vec<T>)(((I)x & fraction) | one);
    const I large = (I)(m > T(1.4142135623730951));
    m = large ? m * T(0.5) : m;
    n -= large;  // a true lane is −1
    const Vec<T> s = (m - T(1)) / (m + T(1)), ss = s * s;
    Vec<T> p = splat<T>(T(2) / T(2 * terms - 1));
    for (int i = terms - 2; i >= 0; --i) p = p * ss + T(2) / T(2 * i + 1);
    const Vec<T> exponent = __builtin_convertvector(n, Vec<T>);
    return exponent * T(0.6931471805599453) + (s * p + (x - x));
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
// Over their common denominator Q = Π (1 + bz) the sums are polynomials in z: 2R = A/Q, Σ b/(1 + bz) = B/Q and
// (1 − 4z)S = C/Q². z ≤ ¼: right at any u. Of all coefficients only C's have two signs, and where they cancel, at z = ¼, S is
// at most 3.
template <class T>
struct ImqPairs {
    static constexpr Metric metric = expanded;
    double base;
    T q[4], a[3], b[3], c[6];

    explicit ImqPairs(const std::vector<double>& p) : base(p.at(0)), q{}, a{}, b{}, c{} {
        double wq[4] = {1}, wa[3] = {}, wb[3] = {}, wc[6] = {};
        for (int i = 1; i <= 3; ++i) {
            const double f = p.at(i), g = p.at(i % 3 + 1), h = p.at((i + 1) % 3 + 1);
            const double others[3] = {1, g + h, g * h};  // (1 + gz)(1 + hz)
            for (int m = 3; m > 0; --m) wq[m] += f * wq[m - 1];
            for (int m = 0; m < 3; ++m) {
                wa[m] += 2 * others[m];
                wb[m] += f * others[m];
                for (int n = 0; n < 3; ++n) wc[m + n] += f * others[m] * others[n];
            }
        }
        std::copy_n(wq, 4, q);
        std::copy_n(wa, 3, a);
        std::copy_n(wb, 3, b);
        for (int m = 5; m > 0; --m) wc[m] -= 4 * wc[m - 1];
        std::copy_n(wc, 6, c);
    }
    double at_zero() const { return 7; }

    template <int order>
    FASTGEN_INLINE Vec<T> operator()(Vec<T> u, Vec<T>& w, Vec<T>&) const {
        static_assert(order < 2, "second derivatives take any scales as they are: ImqSum");
        const Vec<T> v = reciprocal<T>(u + T(1)), vv = v * v, z = v - vv;
        const Vec<T> r = reciprocal<T>(((z * q[3] + q[2]) * z + q[1]) * z + T(1));
        const Vec<T> g = ((z * a[2] + a[1]) * z + a[0]) * r + T(1);
        if constexpr (order > 0) {
            const Vec<T> s = ((((z * c[5] + c[4]) * z + c[3]) * z + c[2]) * z + c[1]) * z + c[0];
            w = vv * ((r * r) * s + g);
        }
        return v * g + ((z * b[2] + b[1]) * z + b[0]) * (z * r);
    }
};

// Any scales: Σ q, q = 1/(1 + u·a), slope Σ a q², bend Σ 2a² q³, where a = base/c.
template <class T>
struct ImqSum {
    static constexpr Metric metric = expanded;
    std::vector<T> a;
    double base;

    // No factor over 1, lest a pair that is none overflows; and the widest kernel must have vanished there.
    explicit ImqSum(const std::vector<double>& p)
        : base(std::max(*std::min_element(p.begin(), p.end()), 1e-20 * *std::max_element(p.begin(), p.end()))) {
        for (double c : p) a.push_back(T(base / c));
    }
    double at_zero() const { return double(a.size()); }

    template <int order>
    FASTGEN_INLINE Vec<T> operator()(Vec<T> u, Vec<T>& w, Vec<T>& e) const {
        Vec<T> k{}, total{}, bends{};
        for (const T factor : a) {
            const Vec<T> q = reciprocal<T>(u * factor + T(1)), slope = q * q * factor;
            k += q;
            if constexpr (order > 0) total += slope;
            if constexpr (order > 1) bends += slope * q * factor;
        }
        if constexpr (order > 0) w = total;
        if constexpr (order > 1) e = bends * T(2);
        return k;
    }
};

// Σ e^(−g u). A rate that is two or four times the one before takes its exponential from that one's by squaring, at most
// four times in a row: each squaring doubles the relative error.
template <class T>
struct Rbf {
    static constexpr Metric metric = expanded;
    std::vector<T> rate;
    std::vector<int> squarings;
    double base;

    explicit Rbf(std::vector<double> p) {
        std::sort(p.begin(), p.end());
        base = 1 / std::min(p[p.size() / 2], 1e30 * p[0]);  // at a pair that is none the least rate must give 0 too
        int row = 0;
        for (size_t i = 0; i < p.size(); ++i) {
            const double ratio = i == 0 ? 0 : p[i] / p[i - 1];
            int steps = std::abs(ratio - 2) < 1e-12 ? 1 : std::abs(ratio - 4) < 1e-12 ? 2 : 0;
            row = row + steps > 4 || steps == 0 ? 0 : row + steps;
            squarings.push_back(row == 0 ? 0 : steps);
            rate.push_back(T(p[i] * base));
        }
    }
    double at_zero() const { return double(rate.size()); }

    template <int order>
    FASTGEN_INLINE Vec<T> operator()(Vec<T> u, Vec<T>& w, Vec<T>& e) const {
        Vec<T> k{}, total{}, bends{}, term{};
        for (size_t i = 0; i < rate.size(); ++i) {
            const T g = rate[i];
            const int steps = squarings[i];
            if (steps == 0)
                term = exp_negative<T>(u * -g);
            else if (steps == 1)
                term = term * term;
            else
                term = (term * term) * (term * term);
            k += term;
            if constexpr (order > 0) total += term * g;
            if constexpr (order > 1) bends += term * (g * g);
        }
        if constexpr (order > 0) w = total;
        if constexpr (order > 1) e = bends;
        return k;
    }
};

// Σ e^(−g d), slope Σ g e^(−g d)/2d, bend Σ g (1 + g d) e^(−g d)/4d³.
template <class T>
struct Laplacian {
    static constexpr Metric metric = direct;
    std::vector<T> rate;
    double base;

    explicit Laplacian(std::vector<double> p) {
        std::sort(p.begin(), p.end());
        const double middle = std::min(p[p.size() / 2], 1e14 * p[0]);  // as for Rbf
        base = 1 / (middle * middle);
        for (double g : p) rate.push_back(T(g / middle));
    }
    double at_zero() const { return double(rate.size()); }

    template <int order>
    FASTGEN_INLINE Vec<T> operator()(Vec<T> u, Vec<T>& w, Vec<T>& e) const {
        Vec<T> k{}, total{}, bends{}, inverse;
        const Vec<T> d = root<T>(u, inverse);
        for (const T g : rate) {
            const Vec<T> term = exp_negative<T>(d * -g), slope = term * g;
            k += term;
            if constexpr (order > 0) total += slope;
            if constexpr (order > 1) bends += slope * (d * g + T(1));
        }
        if constexpr (order > 0) w = total * inverse * T(0.5);
        if constexpr (order > 1) e = bends * inverse * inverse * inverse * T(0.25);
        return k;
    }
};

// −d, slope 1/2d, bend 1/4d³.
template <class T>
struct Energy {
    static constexpr Metric metric = direct;
    double base = 1;

    explicit Energy(const std::vector<double>&) {}
    double at_zero() const { return 0; }

    template <int order>
    FASTGEN_INLINE Vec<T> operator()(Vec<T> u, Vec<T>& w, Vec<T>& e) const {
        Vec<T> inverse;
        const Vec<T> d = root<T>(u, inverse);
        if constexpr (order > 0) w = u >= none<T> ? Vec<T>{} : inverse * T(0.5);
        if constexpr (order > 1) e = w * inverse * inverse * T(0.5);
        return u >= none<T> ? Vec<T>{} : -d;
    }
};

// Σ (1 + u/α)^−α with base 2ℓ², slope Σ (1 + u/α)^−(α+1), bend Σ (1 + 1/α) (1 + u/α)^−(α+2).
template <class T>
struct RationalQuadratic {
    static constexpr Metric metric = expanded;
    std::vector<T> alpha, inverse;
    double base;

    explicit RationalQuadratic(const std::vector<double>& p) : base(2 * p.at(0) * p.at(0)) {
        for (size_t i = 1; i < p.size(); ++i) {
            alpha.push_back(T(p[i]));
            inverse.push_back(T(1 / p[i]));
        }
    }
    double at_zero() const { return double(alpha.size()); }

    template <int order>
    FASTGEN_INLINE Vec<T> operator()(Vec<T> u, Vec<T>& w, Vec<T>& e) const {
        Vec<T> k{}, total{}, bends{};
        for (size_t i = 0; i < alpha.size(); ++i) {
            const Vec<T> x = u * inverse[i], t = x + T(1), shrink = reciprocal<T>(t);
            // What rounding took from t belongs to its logarithm: a large α multiplies it.
            const Vec<T> term = exp_negative<T>((log_above_one<T>(t) + (x - (t - T(1))) * shrink) * -alpha[i]);
            k += term;
            if constexpr (order > 0) total += term * shrink;
            if constexpr (order > 1) bends += term * shrink * shrink * (inverse[i] + T(1));
        }
        if constexpr (order > 0) w = u >= none<T> ? Vec<T>{} : total;
        if constexpr (order > 1) e = u >= none<T> ? Vec<T>{} : bends;
        return u >= none<T> ? Vec<T>{} : k;
    }
};

// (u + c)^p with base 1/γ.
template <class T>
struct Polynomial {
    static constexpr Metric metric = inner;
    int degree;
    T coef;
    double base;

    explicit Polynomial(const std::vector<double>& p) : degree(int(p.at(0))), coef(T(p.at(2))), base(1 / p.at(1)) {}
    double at_zero() const { return 0; }

    template <int order>
    FASTGEN_INLINE Vec<T> operator()(Vec<T> u, Vec<T>& w, Vec<T>& e) const {
        const Vec<T> v = u + coef;
        Vec<T> power = splat<T>(T(1)), before{};  // v^(p − 1) and v^(p − 2)
        for (int i = 1; i < degree; ++i) {
            before = power;
            power *= v;
        }
        if constexpr (order > 0) w = u <= -none<T> ? Vec<T>{} : power * T(degree);
        if constexpr (order > 1) e = u <= -none<T> ? Vec<T>{} : before * T(degree) * T(degree - 1);
        return u <= -none<T> ? Vec<T>{} : power * v;
    }
};
