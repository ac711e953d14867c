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
    const T* x_weight;   // [n] or [batch, n]; both weights or none
    const T* y_weight;   // [m] or [batch, m]
    const double* coefficients;  // of XX, YY and XY, [3] or [batch, 3]; null: from n, m and the estimator
    bool x_weight_batched, y_weight_batched, coefficients_batched;
    T* value;            // [batch]
    T* gx;               // [batch, n, d], or null
    T* gy;               // [batch, m, d], or null; never without gx
    int64_t batch, n, m, d;
    std::string kind;    // of mmd_all
    std::vector<double> parameters;
    int estimator;       // 0 unbiased, 1 biased, 2 u_statistic
    int terms;           // 1 XX + 2 YY + 4 XY
    int threads;
};

void mmd(const MmdArguments<float>& arguments);
void mmd(const MmdArguments<double>& arguments);

}  // namespace fastgen
