// Which instruction sets exist here, which were compiled in, and which one is used.
#pragma once
#include <string>
#include <vector>

namespace pagelens {

struct KernelTable;

// Names, from the oldest to the newest: portable, avx2, avx512, avx512_bf16.
std::vector<std::string> compiled_isas();   // in this build
std::vector<std::string> supported_isas();  // in this build and on this CPU

// The chosen one: PAGELENS_CPU_ISA if that is set, else the newest supported. Chosen on first use.
// Throws std::invalid_argument if PAGELENS_CPU_ISA is unknown, not compiled in, or not supported by this CPU.
std::string isa();
// Chooses again (for tests). Same errors. Not while a kernel runs.
void set_isa(const std::string& name);
const KernelTable& kernels();

}  // namespace pagelens
