// Maximum mean discrepancy on the CPU: value and unit gradients, or the Hessian's product with directions, in one pass over
// the pairs, memory O((N + M) D).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace fastgen {

template <class T>
struct MmdArguments {
    const T* x;          // [batch, n, d]
    const T* y;          // [batch, m, d]
    const T* vx;         // directions [batch, n, d]: in place of the gradients their change along (vx, vy); or null
    const T* vy;         // [batch, m, d], or null: y is a constant
    const T* x_weight;   // [batch, n]; both weights or none
    const T* y_weight;   // [batch, m]
    const double* coefficients;  // of XX, YY and XY, [batch, 3]; null: from n, m and the estimator
    T* value;            // [batch]; null where vx is not
    T* gx;               // [batch, n, d], or null
    T* gy;               // [batch, m, d], or null; never without gx
    int64_t batch, n, m, d;
    std::string kind;    // of mmd_of
    std::vector<double> parameters;
    int estimator;       // 0 unbiased, 1 biased, 2 u_statistic
    int terms;           // 1 XX + 2 YY + 4 XY
    int threads;
};

void mmd(const MmdArguments<float>& arguments);
void mmd(const MmdArguments<double>& arguments);
void mmd_second(const MmdArguments<float>& arguments);  // where there are directions
void mmd_second(const MmdArguments<double>& arguments);

}  // namespace fastgen
