#include "mmd.h"
#include "pages.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <vector>

#define FASTGEN_BODY "mmd.inl"
#include "each_isa.h"

namespace fastgen {

void mmd(const MmdArguments<float>& arguments) {
    if (arguments.vx != nullptr) return mmd_second(arguments);
    FASTGEN_DISPATCH(mmd_all, arguments);
}

void mmd(const MmdArguments<double>& arguments) {
    if (arguments.vx != nullptr) return mmd_second(arguments);
    FASTGEN_DISPATCH(mmd_all, arguments);
}

}  // namespace fastgen
