// Feature maps in memory, float, double, bfloat16 or float16, and in registers, float or double. Halves are widened as they
// are loaded and rounded to nearest even as they are stored.

template <class T>
struct Lanes {
    static constexpr int count = VEC_BYTES / sizeof(T);
    typedef T V __attribute__((vector_size(VEC_BYTES)));
};
using Floats = Lanes<float>::V;
typedef uint32_t Words __attribute__((vector_size(VEC_BYTES)));
typedef uint16_t Shorts __attribute__((vector_size(VEC_BYTES / 2)));

struct Bfloat16 {
    uint16_t raw;
};
struct Float16 {
    uint16_t raw;
};

template <class S>
struct Wide {
    typedef float T;
};
template <>
struct Wide<double> {
    typedef double T;
};

template <class V, class P>
static inline V get(const P* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class P>
static inline void put(P* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

static inline Floats load(const float* p) { return get<Floats>(p); }
static inline Lanes<double>::V load(const double* p) { return get<Lanes<double>::V>(p); }
static inline Floats load(const Bfloat16* p) { return (Floats)(__builtin_convertvector(get<Shorts>(p), Words) << 16); }
static inline Floats load(const Float16* p) {
    const Words raw = __builtin_convertvector(get<Shorts>(p), Words);
    const Words magnitude = (raw & 0x7fffu) << 13, sign = (raw & 0x8000u) << 16;
    const Floats finite = (Floats)magnitude * 0x1p112f;  // exact, subnormals among them
    return (Floats)((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : (Words)finite) | sign);
}

static inline void store(float* p, Floats v) { put(p, v); }
static inline void store(double* p, Lanes<double>::V v) { put(p, v); }
static inline void store(Bfloat16* p, Floats v) {
    const Words b = (Words)v, even = (b + 0x7fffu + (b >> 16 & 1u)) >> 16, nan = b >> 16 | 0x40u;
    put(p, __builtin_convertvector(v == v ? even : nan, Shorts));
}
static inline void store(Float16* p, Floats v) {
    const Words b = (Words)v, sign = b >> 16 & 0x8000u, magnitude = b & 0x7fffffffu;
    // Adding ½ leaves the subnormal's 10 bits, rounded, at the bottom of the sum.
    const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
    const Words normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const Words none{}, large = magnitude > 0x7f800000u ? none + 0x7e00u : none + 0x7c00u;
    const Words half = magnitude >= 0x47800000u ? large : magnitude < 0x38800000u ? subnormal : normal;
    put(p, __builtin_convertvector(sign | half, Shorts));
}

// Past the caches, where p is aligned to a vector: of what is too large to be found there again nothing is then read to be
// overwritten. Before another thread may see it comes a `fence`.
template <class T, class V>
static inline void store_past(T* p, V v) {
    float* const to = reinterpret_cast<float*>(p);
#if !defined(__x86_64__) || !defined(__GNUC__) || defined(__clang__)
    put(to, v);
#elif VEC_BYTES == 64
    __builtin_ia32_movntps512(to, (Floats)v);
#elif VEC_BYTES == 32
    __builtin_ia32_movntps256(to, (Floats)v);
#else
    __builtin_ia32_movntps(to, (Floats)v);
#endif
}
static inline void fence() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    __builtin_ia32_sfence();
#endif
}

// Of the `left` elements that there are; `full` says at compile time that there are enough.
template <bool full, class S>
static inline auto load(const S* p, int64_t left) {
    constexpr int count = Lanes<typename Wide<S>::T>::count;
    if (full || left >= count) return load(p);
    S some[count] = {};
    std::memcpy(some, p, size_t(left) * sizeof(S));
    return load(some);
}
template <bool full, class S, class V>
static inline void store(S* p, V v, int64_t left) {
    constexpr int count = Lanes<typename Wide<S>::T>::count;
    if (full || left >= count) return store(p, v);
    S some[count];
    store(some, v);
    std::memcpy(p, some, size_t(left) * sizeof(S));
}

template <class To, class From>
static inline void copy(To* to, const From* from, int64_t count) {
    constexpr int step = Lanes<typename Wide<To>::T>::count;
    for (int64_t i = 0; i < count; i += step) store<false>(to + i, load<false>(from + i, count - i), count - i);
}

template <class V, size_t... l>
static inline auto halves(V v, std::index_sequence<l...>) {
    return __builtin_shufflevector(v, v, int(l)...) + __builtin_shufflevector(v, v, int(sizeof...(l) + l)...);
}

template <class T, size_t count = VEC_BYTES / sizeof(T), class V>
static inline T lane_sum(V v) {
    if constexpr (count == 2)
        return v[0] + v[1];
    else
        return lane_sum<T, count / 2>(halves(v, std::make_index_sequence<count / 2>{}));
}

// In lanes, so that the order of the sum is the same whatever the compiler vectorises.
template <class T>
static inline double sum_of(const T* v, int64_t count) {
    double lanes[8] = {};
    const int64_t even = count / 8 * 8;
    for (int64_t i = 0; i < even; i += 8)
        for (int l = 0; l < 8; ++l) lanes[l] += double(v[i + l]);
    double rest = 0;
    for (int64_t i = even; i < count; ++i) rest += double(v[i]);
    return rest + ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}
