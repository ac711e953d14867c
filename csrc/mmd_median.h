// One order statistic of the squared distances of all pairs, exactly, in memory that grows with n + m.
#pragma once
#include <cstdint>

namespace fastgen {

template <class T>
struct MedianArguments {
    const T* x;    // [n, d]
    const T* y;    // [m, d]; x again where `same`
    T* value;      // the rank-th largest squared distance; NaN where any is not finite
    int64_t* pair; // [2]: the first pair (i, j), row by row, that has it; (0, 0) with NaN
    int64_t n, m, d;
    int64_t rank;  // 1 is the largest; among the pairs i < j where `same`, else among all n·m
    bool same;
    int threads;
};

void median(const MedianArguments<float>& arguments);
void median(const MedianArguments<double>& arguments);

}  // namespace fastgen
