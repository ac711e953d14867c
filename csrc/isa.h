// Which instruction set the kernels run on: found once from the processor, lowered by FASTGEN_ISA or set_isa().
#pragma once
#include <string>

namespace fastgen {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

Isa isa();
std::string isa_name();
void set_isa(const std::string& name);  // "baseline", "avx2", "avx512"; more than the processor has throws

}  // namespace fastgen
