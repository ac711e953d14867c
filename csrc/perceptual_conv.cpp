#include "pages.h"
#include "perceptual_conv.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define FASTGEN_BODY "perceptual_conv.inl"
#include "each_isa.h"

namespace fastgen {

void conv3x3(const Conv3x3& conv) {
    large_pages(conv.y, conv.n * conv.h * conv.w * conv.out * int64_t(sizeof(float)));
    FASTGEN_DISPATCH(conv3x3, conv);
}

}  // namespace fastgen
