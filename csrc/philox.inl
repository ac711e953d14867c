// Noise stream v1, LANES counters at a time; fastgen/reference/langevin.py states it. Included by a FASTGEN_BODY.
//
// Every operation on floats is a plain + - * or square root: the file that includes this one turns contraction off.

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

struct Keys {
    uint64_t k0[10], k1[10];
    explicit Keys(uint64_t seed) {
        uint32_t a = uint32_t(seed), b = uint32_t(seed >> 32);
        for (int round = 0; round < 10; ++round, a += 0x9E3779B9u, b += 0xBB67AE85u) k0[round] = a, k1[round] = b;
    }
};

// A counter lives in the low half of a 64-bit lane; what the upper half holds is never read by mul_low.
[[gnu::always_inline]] static inline void rounds(u64v& c0, u64v& c1, u64v& c2, u64v& c3, const Keys& keys) {
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const u64v a = mul_low(c0, 0xD2511F53u), b = mul_low(c2, 0xCD9E8D57u);
        c0 = (b >> 32) ^ c1 ^ keys.k0[round];
        c2 = (a >> 32) ^ c3 ^ keys.k1[round];
        c1 = b, c3 = a;
    }
}

// Words of LANES counters: the even lanes go through the rounds in one set of registers, the odd ones in another.
[[gnu::always_inline]] static inline void philox(u32v c0, u32v c1, u32v c2, u32v c3, const Keys& keys, u32v w[4]) {
    u64v a[4] = {(u64v)c0, (u64v)c1, (u64v)c2, (u64v)c3}, b[4];
    for (int i = 0; i < 4; ++i) b[i] = a[i] >> 32;
    rounds(a[0], a[1], a[2], a[3], keys);
    rounds(b[0], b[1], b[2], b[3], keys);
    for (int i = 0; i < 4; ++i) w[i] = (u32v)((a[i] & 0xffffffffu) | (b[i] << 32));
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

static inline void pair(u32v a, u32v b, f32v& first, f32v& second) {
    const i32v k = (i32v)__builtin_convertvector((i32v)((a >> 1) | 1), f32v) - (0x3f3504f3 + (31 << 23));
    const f32v x = (f32v)((k & 0x7fffff) + 0x3f3504f3) - 1.0f;
    const f32v e = __builtin_convertvector(k & ~0x7fffff, f32v);
    f32v q = x * -0.1746968924999237f + 0.2861504554748535f;
    q = q * x + -0.2983594536781311f;
    q = q * x + 0.33141016960144043f;
    q = q * x + -0.39924144744873047f;
    q = q * x + 0.5000351071357727f;
    q = q * x + -0.6666790246963501f;
    q = q * x + 0.9999998211860657f;
    const f32v r = root(((x * x) * q - (x + x)) + e * -1.6525916635146132e-07f);
    const f32v signed_r = (f32v)((u32v)r ^ (b & 0x80000000u));

    const f32v y = __builtin_convertvector((i32v)((b << 2) | 2), f32v) * 3.65729529994141e-10f;
    const f32v z = y * y;
    const f32v s = y + y * (z * ((z * -0.00019515282474458218f + 0.00833216030150652f) * z + -0.16666655242443085f));
    const f32v c = 1.0f + z * ((z * -0.0013591853203251958f + 0.041655778884887695f) * z + -0.4999988377094269f);
    const i32v swap = (i32v)(b << 1) < 0;
    first = signed_r * (swap ? s : c);
    second = signed_r * (swap ? c : s);
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

// 4 * LANES normals in the order of the elements.
[[gnu::always_inline]] static inline void normals(u32v c0, u32v c1, u32v c2, u32v c3, const Keys& keys, float* out) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
    u32v w[4];
    philox(c0, c1, c2, c3, keys, w);
    f32v n0, n1, n2, n3;
    pair(w[0], w[1], n0, n1);
    pair(w[2], w[3], n2, n3);
    const f32v a = unpack<false, false>(n0, n1, lanes), b = unpack<false, false>(n2, n3, lanes);
    const f32v c = unpack<true, false>(n0, n1, lanes), d = unpack<true, false>(n2, n3, lanes);
    const f32v rows[4] = {unpack<false, true>(a, b, lanes), unpack<true, true>(a, b, lanes),
                          unpack<false, true>(c, d, lanes), unpack<true, true>(c, d, lanes)};
    std::memcpy(out, rows, sizeof rows);
}
