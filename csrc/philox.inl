// Noise stream v1, two batches of LANES counters at a time; fastgen/reference/langevin.py states it. Included by a
// FASTGEN_BODY.
//
// Every operation on floats is a plain + - * or square root: the file that includes this one turns contraction off. What
// is computed N times over is written operation by operation: work that does not wait for each other then stands within
// the window in which the processor looks for it.

typedef uint64_t u64v __attribute__((vector_size(VEC_BYTES)));
typedef uint32_t u32v __attribute__((vector_size(VEC_BYTES)));
typedef int32_t i32v __attribute__((vector_size(VEC_BYTES)));
typedef float f32v __attribute__((vector_size(VEC_BYTES)));

constexpr int LANES = VEC_BYTES / 4;

// The low half of each 64-bit lane times m. GCC has no pattern that finds vpmuludq in a 64-bit product (5x slower).
static inline u64v mul_low(u64v a, uint32_t m) {
#if VEC_BYTES == 64
    typedef int v16si __attribute__((vector_size(64)));
    typedef long long v8di __attribute__((vector_size(64)));
    return (u64v)__builtin_ia32_pmuludq512_mask((v16si)a, (v16si)(u64v{} + m), v8di{}, 0xff);
#elif VEC_BYTES == 32
    typedef int v8si __attribute__((vector_size(32)));
    return (u64v)__builtin_ia32_pmuludq256((v8si)a, (v8si)(u64v{} + m));
#elif defined(__x86_64__)
    typedef int v4si __attribute__((vector_size(16)));
    return (u64v)__builtin_ia32_pmuludq128((v4si)a, (v4si)(u64v{} + m));
#else
    return (a & 0xffffffffu) * m;
#endif
}

// The polynomials of fastgen/reference/langevin.py.
constexpr float L0 = 0.9999998211860657f, L1 = -0.6666790246963501f, L2 = 0.5000351071357727f, L3 = -0.39924144744873047f,
                L4 = 0.33141016960144043f, L5 = -0.2983594536781311f, L6 = 0.2861504554748535f, L7 = -0.1746968924999237f,
                S0 = -0.16666655242443085f, S1 = 0.00833216030150652f, S2 = -0.00019515282474458218f,
                C0 = -0.4999988377094269f, C1 = 0.041655778884887695f, C2 = -0.0013591853203251958f,
                MINUS_2_LN2 = -1.6525916635146132e-07f, QUARTER_PI = 3.65729529994141e-10f;

struct Keys {
    uint64_t k0[10], k1[10];
    explicit Keys(uint64_t seed) {
        uint32_t a = uint32_t(seed), b = uint32_t(seed >> 32);
        for (int round = 0; round < 10; ++round, a += 0x9E3779B9u, b += 0xBB67AE85u) k0[round] = a, k1[round] = b;
    }
};

#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); ++i)

// A counter lives in the low half of a 64-bit lane; what the upper half holds is never read by mul_low.
template <int N>
[[gnu::always_inline]] static inline void rounds(u64v (&c)[N][4], const Keys& keys) {
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        u64v a[N], b[N];
        EACH(i, N) a[i] = mul_low(c[i][0], 0xD2511F53u), b[i] = mul_low(c[i][2], 0xCD9E8D57u);
        EACH(i, N) {
            c[i][0] = (b[i] >> 32) ^ c[i][1] ^ keys.k0[round];
            c[i][2] = (a[i] >> 32) ^ c[i][3] ^ keys.k1[round];
            c[i][1] = b[i], c[i][3] = a[i];
        }
    }
}

// Counters of BATCHES * LANES groups to their words, in place: the even lanes go through the rounds in one set of
// registers, the odd ones in another.
template <int BATCHES>
[[gnu::always_inline]] static inline void philox(u32v (&c)[BATCHES][4], const Keys& keys) {
    u64v wide[2 * BATCHES][4];
    EACH(i, BATCHES) EACH(j, 4) wide[2 * i][j] = (u64v)c[i][j], wide[2 * i + 1][j] = (u64v)c[i][j] >> 32;
    rounds(wide, keys);
    EACH(i, BATCHES) EACH(j, 4) c[i][j] = (u32v)((wide[2 * i][j] & 0xffffffffu) | (wide[2 * i + 1][j] << 32));
}

static inline f32v root(f32v v) {
#if VEC_BYTES == 64
    return __builtin_ia32_sqrtps512_mask(v, v, (unsigned short)0xffff, 4);  // 4: the current rounding mode
#elif VEC_BYTES == 32
    return __builtin_ia32_sqrtps256(v);
#elif defined(__x86_64__)
    return __builtin_ia32_sqrtps(v);
#else
    for (int i = 0; i < LANES; ++i) v[i] = std::sqrt(v[i]);
    return v;
#endif
}

// Pairs of words to pairs of normals.
template <int N>
[[gnu::always_inline]] static inline void pairs(const u32v (&a)[N], const u32v (&b)[N], f32v (&first)[N], f32v (&second)[N]) {
    i32v k[N];
    f32v e[N], x[N], z[N], high[N], low[N], r[N], y[N], s[N], c[N];
    EACH(i, N) k[i] = (i32v)__builtin_convertvector((i32v)((a[i] >> 1) | 1), f32v) - (0x3f3504f3 + (31 << 23));
    EACH(i, N) y[i] = __builtin_convertvector((i32v)((b[i] << 2) | 2), f32v);
    EACH(i, N) x[i] = (f32v)((k[i] & 0x7fffff) + 0x3f3504f3) - 1.0f;
    EACH(i, N) e[i] = __builtin_convertvector(k[i] & ~0x7fffff, f32v);
    EACH(i, N) z[i] = x[i] * x[i];
    EACH(i, N) high[i] = (x[i] * L7 + L6) * z[i] + (x[i] * L5 + L4);
    EACH(i, N) low[i] = (x[i] * L3 + L2) * z[i] + (x[i] * L1 + L0);
    EACH(i, N) low[i] = high[i] * (z[i] * z[i]) + low[i];
    EACH(i, N) r[i] = root((z[i] * low[i] - (x[i] + x[i])) + e[i] * MINUS_2_LN2);
    EACH(i, N) y[i] = y[i] * QUARTER_PI;
    EACH(i, N) z[i] = y[i] * y[i];
    EACH(i, N) s[i] = (z[i] * S2 + S1) * z[i] + S0;
    EACH(i, N) c[i] = (z[i] * C2 + C1) * z[i] + C0;
    EACH(i, N) s[i] = y[i] + y[i] * (z[i] * s[i]);
    EACH(i, N) c[i] = 1.0f + z[i] * c[i];
    EACH(i, N) r[i] = (f32v)((u32v)r[i] ^ (b[i] & 0x80000000u));
    EACH(i, N) {
        const i32v swap = (i32v)(b[i] << 1) < 0;
        first[i] = r[i] * (swap ? s[i] : c[i]);
        second[i] = r[i] * (swap ? c[i] : s[i]);
    }
}

// Lane 4*L + k of a batch takes the group LANES/4*k + L, so that the transposition below stays within 128-bit lanes.
static inline int lane_of(int group) { return group % (LANES / 4) * 4 + group / (LANES / 4); }

// unpcklps, unpckhps (pairs of floats: unpcklpd, unpckhpd).
template <bool high, bool wide, int... I>
static inline f32v unpack(f32v a, f32v b, std::integer_sequence<int, I...>) {
    constexpr auto from = [](int i) {
        const int at = i % 4, second = wide ? at / 2 : at % 2, offset = wide ? at % 2 : at / 2;
        return i - at + offset + 2 * high + second * LANES;
    };
#if defined(__clang__)
    return __builtin_shufflevector(a, b, from(I)...);
#else
    return __builtin_shuffle(a, b, (i32v){from(I)...});
#endif
}

// BATCHES * 4 * LANES normals in the order of the elements; the counters are used up.
template <int BATCHES>
[[gnu::always_inline]] static inline void normals(u32v (&counter)[BATCHES][4], const Keys& keys, float* out) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
    philox(counter, keys);
    u32v a[2 * BATCHES], b[2 * BATCHES];
    f32v first[2 * BATCHES], second[2 * BATCHES];
    EACH(i, 2 * BATCHES) a[i] = counter[i / 2][i % 2 * 2], b[i] = counter[i / 2][i % 2 * 2 + 1];
    pairs(a, b, first, second);
    for (int i = 0; i < BATCHES; ++i) {
        const f32v n0 = first[2 * i], n1 = second[2 * i], n2 = first[2 * i + 1], n3 = second[2 * i + 1];
        const f32v l01 = unpack<false, false>(n0, n1, lanes), l23 = unpack<false, false>(n2, n3, lanes);
        const f32v h01 = unpack<true, false>(n0, n1, lanes), h23 = unpack<true, false>(n2, n3, lanes);
        const f32v rows[4] = {unpack<false, true>(l01, l23, lanes), unpack<true, true>(l01, l23, lanes),
                              unpack<false, true>(h01, h23, lanes), unpack<true, true>(h01, h23, lanes)};
        std::memcpy(out + i * 4 * LANES, rows, sizeof rows);
    }
}
