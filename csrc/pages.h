#pragma once
#include <cstdint>

namespace fastgen {

// Of memory about to be written whole: what of it is new then comes from the system in large pages, where there are any.
// New memory comes a page at a time, each cleared at its first write: of 4 KiB that takes longer than most kernels here.
// Below 32 MiB nothing is done: C's allocator mostly hands out memory used before, and always maps new memory from there.
void large_pages(void* data, int64_t bytes);

}  // namespace fastgen
