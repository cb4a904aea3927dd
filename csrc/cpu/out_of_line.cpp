// What kernels.cpp uses of std:: outside its own namespaces and the compiler may leave out of line: whether it does differs
// between instruction sets, and the linker keeps the first copy. These, compiled with the baseline, come before all others.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../row_state.h"

template class std::vector<double>;
template class std::vector<float>;
template class std::vector<int32_t>;
template class std::vector<int64_t>;
template class std::vector<uint8_t>;
template class std::vector<uint16_t>;
template class std::vector<uint32_t>;
template class std::vector<fastcalib::Sums>;
template const double* std::min_element<const double*>(const double*, const double*);
