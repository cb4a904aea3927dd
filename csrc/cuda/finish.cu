// From parts to results, a warp per row. Not yet run on a GPU.
#include "finish.cuh"

namespace fastcalib::cuda {
namespace {

__global__ void __launch_bounds__(32, 16) finish_rows(const StatisticsArgs a, const Partial partial) {
    finish_row(a, partial, blockIdx.x);
}

__global__ void __launch_bounds__(256) finish_ranks(const RanksArgs a, const Partial partial, int64_t splits) {
    const int64_t row = blockIdx.x, k_count = a.temperatures.count;
    const int64_t begin = a.selected.begin(row), end = a.selected.end(row);
    float* mass = static_cast<float*>(a.mass_greater);
    const float nan = __int_as_float(0x7fc00000);
    const int64_t step = int64_t(gridDim.y) * blockDim.x;
    for (int64_t i = begin + int64_t(blockIdx.y) * blockDim.x + threadIdx.x; i < end; i += step) {
        const int place = partial.place[i];
        int64_t greater = 0, equal = 0;
        if (place >= 0) {
            for (int64_t split = 0; split < splits; ++split) {
                const uint2 part = *partial.counts(split, begin + place);
                greater += part.x;
                equal += part.y;
            }
            if (a.selected.ids) --equal;  // not the token itself
        }
        a.n_greater[i] = place == kBadPlace ? -1 : greater;
        a.n_equal[i] = place == kBadPlace ? -1 : equal;
        for (int64_t k = 0; k < k_count; ++k) {
            double sum = 0;
            if (place == kBadPlace) {
                sum = nan;
            } else if (place >= 0) {
                for (int64_t s = 0; s < partial.segments; ++s)
                    sum = fma(*partial.weight(row, s, k), double(*partial.masses(s, k, begin + place)), sum);
            } else if (place == kNaNPlace) {
                sum = 0.0 * *partial.weight(row, 0, k);  // NaN for a row without a softmax
            }
            mass[i * k_count + k] = sum > 1.0 ? 1.0f : float(sum);
        }
    }
}

}  // namespace

int launch_finish_rows(const StatisticsArgs& args, const Partial& partial, Stream stream) {
    if (args.logits.rows == 0 || args.temperatures.count == 0) return 0;
    finish_rows<<<unsigned(args.logits.rows), 32, 0, stream>>>(args, partial);
    return int(cudaGetLastError());
}

int launch_finish_ranks(const RanksArgs& args, const Partial& partial, int64_t splits, int64_t most, Stream stream) {
    if (args.logits.rows == 0 || partial.nnz == 0) return 0;
    const int64_t threads = std::min<int64_t>(256, divide_up(most, 32) * 32);
    const dim3 grid(unsigned(args.logits.rows), unsigned(std::clamp<int64_t>(divide_up(most, threads), 1, 64)));
    finish_ranks<<<grid, unsigned(threads), 0, stream>>>(args, partial, splits);
    return int(cudaGetLastError());
}

}  // namespace fastcalib::cuda
