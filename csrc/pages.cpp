#include "pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastgen {

void large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2 << 20;
    if (data == nullptr || bytes < 32 << 20) return;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / page * page;
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // a system without them refuses: no matter
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace fastgen
