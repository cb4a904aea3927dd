// Which instruction set's kernels run.
#pragma once
#include <string>
#include <vector>

#include "api.h"

namespace fastcalib {

// Best first: what was compiled in and this machine can run.
std::vector<std::string> available_isas();

// The kernels in use: FASTCALIB_ISA from the environment, else the best.
const Kernels& kernels();

// Switch; throws std::invalid_argument with the possible names.
void set_isa(const std::string& name);

}  // namespace fastcalib
