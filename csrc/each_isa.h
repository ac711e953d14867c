// Compiles one kernel body once for each instruction set, each in a namespace of its own. Before including this file:
//
//   #include every standard header that the body needs (they must not be compiled for AVX-512)
//   #define FASTGEN_BODY "family.inl"
//
// The body sees VEC_BYTES, the width of a vector register, and stands in namespace baseline, avx2 or avx512.
// FASTGEN_DISPATCH(function, arguments...) then calls the one that isa() names.
#include "isa.h"

#define VEC_BYTES 16
namespace fastgen::baseline {
#include FASTGEN_BODY
}
#undef VEC_BYTES

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define VEC_BYTES 32
namespace fastgen::avx2 {
#include FASTGEN_BODY
}
#undef VEC_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#define VEC_BYTES 64
namespace fastgen::avx512 {
#include FASTGEN_BODY
}
#undef VEC_BYTES
#pragma GCC pop_options

#define FASTGEN_DISPATCH(function, ...)                             \
    (isa() == Isa::avx512 ? ::fastgen::avx512::function(__VA_ARGS__) \
     : isa() == Isa::avx2 ? ::fastgen::avx2::function(__VA_ARGS__)   \
                          : ::fastgen::baseline::function(__VA_ARGS__))
#else
#define FASTGEN_DISPATCH(function, ...) ::fastgen::baseline::function(__VA_ARGS__)
#endif
