// Mean and 1/√(variance + eps) of a sample's groups from the moments of its chunks (Chan, Golub & LeVeque 1983,
// "Algorithms for computing the sample variance").
#pragma once

#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int kGroupsAtOnce = 16;  // their chains of double additions do not wait for each other

// moments: (chunks, groups, 2), mean and sum of squared deviations in each of a sample's chunks of `rows` of its N
// pixels, of `width` channels to a group. statistics: (groups, 2).
DDPM_FAST_NOINLINE void merge_moments(const float* moments, int64_t groups, int64_t width, int64_t rows, int64_t N,
                                      float eps, float* statistics) {
  for (int64_t first = 0; first < groups; first += kGroupsAtOnce) {
    const int64_t of_these = min<int64_t>(kGroupsAtOnce, groups - first);
    double count = 0, means[kGroupsAtOnce] = {}, squares[kGroupsAtOnce] = {};
    const float* of_chunk = moments + 2 * first;
    for (int64_t row = 0; row < N; row += rows, of_chunk += 2 * groups) {
      const double added = static_cast<double>(width * min(rows, N - row));
      const double share = added / (count + added), both = count * share;
      const auto add = [&](int64_t n) DDPM_FAST_LAMBDA {
        const double difference = of_chunk[2 * n] - means[n];
        means[n] += difference * share;
        squares[n] += of_chunk[2 * n + 1] + difference * difference * both;
      };
      if (of_these == kGroupsAtOnce) {
        for (int n = 0; n < kGroupsAtOnce; ++n) add(n);
      } else {
        for (int64_t n = 0; n < of_these; ++n) add(n);
      }
      count += added;
    }
    for (int64_t n = 0; n < of_these; ++n) {
      float* to = statistics + 2 * (first + n);
      to[0] = static_cast<float>(means[n]);
      to[1] = static_cast<float>(1 / __builtin_sqrt(squares[n] / count + static_cast<double>(eps)));
    }
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
