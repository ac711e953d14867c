#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastgen {
namespace {

Isa best_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::baseline;
}

Isa parse(const std::string& name) {
    if (name == "baseline") return Isa::baseline;
    if (name == "avx2") return Isa::avx2;
    if (name == "avx512") return Isa::avx512;
    throw std::invalid_argument("isa: expected baseline, avx2 or avx512, got " + name);
}

Isa initial() {
    const char* wanted = std::getenv("FASTGEN_ISA");
    if (wanted == nullptr || *wanted == '\0') return best_isa();
    const Isa asked = parse(wanted), best = best_isa();
    return asked < best ? asked : best;
}

std::atomic<Isa>& current() {
    static std::atomic<Isa> value{initial()};
    return value;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

std::string isa_name() {
    switch (isa()) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        default: return "baseline";
    }
}

void set_isa(const std::string& name) {
    const Isa asked = parse(name);
    if (asked > best_isa()) throw std::invalid_argument("isa: this processor has no " + name);
    current().store(asked);
}

}  // namespace fastgen
