// Maximum mean discrepancy on the CPU: value and unit gradients in one pass over the pairs, memory O((N + M) D).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace fastgen {

template <class T>
struct MmdArguments {
    const T* x;          // [batch, n, d]
    const T* y;          // [batch, m, d]
    T* value;            // [batch]
    T* gx;               // [batch, n, d], or null
    T* gy;               // [batch, m, d], or null; never without gx
    int64_t batch, n, m, d;
    std::string kind;    // "imq_pairs", "imq", "rbf"
    std::vector<double> parameters;
    int estimator;       // 0 unbiased, 1 biased, 2 u_statistic
    int threads;
};

void mmd(const MmdArguments<float>& arguments);
void mmd(const MmdArguments<double>& arguments);

}  // namespace fastgen
