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
    int64_t few = 96;  // up to so many queries scan the database as it is, in float, where a vector holds 16 of them and
                       // on several threads; fewer with narrower ones, a third in double, half on one thread; 0: none do
    bool every_pair = false;      // no filter: each allowed pair is measured directly
    double reach = 0;             // a row whose distance to a query that may choose it is below `reach` is rejected:
    uint8_t* rejected = nullptr;  // [m], marked here; null without rejection
};

struct NearestStatus {
    enum Code { ok, query_not_finite, database_not_finite, overflow } code;
    int64_t row;
};

// The k smallest (distance, index) of each query; the method is described in nearest.cpp. Every query has at least k rows.
// With `rejected`, the k smallest among the rows at or beyond `reach` of the query itself; another query may have
// rejected one of them, so the caller searches such queries again. Where fewer than k are left, index and distance keep
// what they held.
NearestStatus nearest(const NearestProblem& problem);

// The distances alone, of the rows `index` [n, k] that problem.index names, into problem.distance.
void nearest_distance(const NearestProblem& problem);

}  // namespace fastgen
