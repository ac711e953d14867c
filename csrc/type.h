// What numbers a buffer holds, in the order of the ops' tables.
#pragma once
#include <cstdint>

namespace fastgen {

enum class Type : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

inline int64_t bytes_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

}  // namespace fastgen
