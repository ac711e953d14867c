#pragma once
#include <cstdint>

namespace fastgen {

struct NearestProblem {
    const void *query, *database;  // [n, d], [m, d], row-major float or double
    bool is_double;
    int64_t n, m, d, k;
    const uint8_t* mask;  // null, [m] or, where mask_stride = m, [n, m]
    int64_t mask_stride;
    int64_t* index;    // [n, k]
    float* distance;   // [n, k]
    int threads;
    bool vnni;  // false: without the VNNI instructions where the processor has them (tests)
};

struct NearestStatus {
    enum Code { ok, query_not_finite, database_not_finite, overflow } code;
    int64_t row;
};

// The k smallest (distance, index) of each query; the method is described in nearest.inl. Every query has at least k rows.
NearestStatus nearest(const NearestProblem& problem);

// The distances alone, of the rows `index` [n, k] that problem.index names, into problem.distance.
void nearest_distance(const NearestProblem& problem);

}  // namespace fastgen
