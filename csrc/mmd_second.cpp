// The second order of mmd.inl, compiled beside the first.
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

void mmd_second(const MmdArguments<float>& arguments) { FASTGEN_DISPATCH(mmd_second_all, arguments); }
void mmd_second(const MmdArguments<double>& arguments) { FASTGEN_DISPATCH(mmd_second_all, arguments); }

}  // namespace fastgen
