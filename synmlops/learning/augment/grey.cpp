// Changes grey values of dense float32 sections in place: blur, smear and noise, each in one pass where torch
// takes one for every weight.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

using Int = std::int64_t;

constexpr int kLane = 8, kLanes = 4;  // sums of 32 voxels stay in registers
typedef float Lane __attribute__((vector_size(kLane * sizeof(float)), aligned(4), may_alias));

// out[x] = sum over k of weights[k] * rows[k][x]
void weigh(const std::vector<const float*>& rows, const float* weights, Int width, float* out) {
  Int x = 0;
  for (; x + kLane * kLanes <= width; x += kLane * kLanes) {
    Lane sums[kLanes] = {};
    for (std::size_t k = 0; k < rows.size(); ++k)
      for (int lane = 0; lane < kLanes; ++lane)
        sums[lane] += weights[k] * *reinterpret_cast<const Lane*>(rows[k] + x + lane * kLane);
    for (int lane = 0; lane < kLanes; ++lane) *reinterpret_cast<Lane*>(out + x + lane * kLane) = sums[lane];
  }
  for (; x < width; ++x) {
    float sum = 0;
    for (std::size_t k = 0; k < rows.size(); ++k) sum += weights[k] * rows[k][x];
    out[x] = sum;
  }
}

// A row, continued beyond its ends by so many voxels.
void continue_row(const float* row, Int width, Int reach, float* out) {
  std::fill_n(out, reach, row[0]);
  std::copy_n(row, width, out + reach);
  std::fill_n(out + reach + width, reach, row[width - 1]);
}

}  // namespace

extern "C" {

// `weights`: 2 * reach + 1 of them, along x and then along y.
void blur(float* image, Int sections, Int height, Int width, const float* weights, Int reach, Int) {
  std::vector<float> along_x(height * width), wide(width + 2 * reach);
  std::vector<const float*> rows(2 * reach + 1);
  for (Int z = 0; z < sections; ++z, image += height * width) {
    for (Int y = 0; y < height; ++y) {
      continue_row(image + y * width, width, reach, wide.data());
      for (Int k = 0; k <= 2 * reach; ++k) rows[k] = wide.data() + k;
      weigh(rows, weights, width, along_x.data() + y * width);
    }
    for (Int y = 0; y < height; ++y) {
      for (Int k = 0; k <= 2 * reach; ++k)
        rows[k] = along_x.data() + std::clamp<Int>(y + k - reach, 0, height - 1) * width;
      weigh(rows, weights, width, image + y * width);
    }
  }
}

// The mean of a section over `n` voxels around each; `offsets` are y and x of each, none beyond `reach`.
void smear(float* section, Int height, Int width, const Int* offsets, Int n, Int reach, Int) {
  const Int step = width + 2 * reach;
  std::vector<float> wide(height * step);
  for (Int y = 0; y < height; ++y) continue_row(section + y * width, width, reach, wide.data() + y * step);
  std::vector<const float*> rows(n);
  const std::vector<float> weights(n, 1.0f / n);
  for (Int y = 0; y < height; ++y) {
    for (Int k = 0; k < n; ++k)
      rows[k] = wide.data() + std::clamp<Int>(y + offsets[2 * k], 0, height - 1) * step + reach + offsets[2 * k + 1];
    weigh(rows, weights.data(), width, section + y * width);
  }
}

// Adds to each voxel of a box what its own random number picks from a table of 2^(16 - shift) values.
void add_picked(float* box, Int sections, Int height, Int width, Int step_z, Int step_y,
                const std::uint16_t* random, const float* table, Int shift, Int) {
  for (Int z = 0; z < sections; ++z)
    for (Int y = 0; y < height; ++y, random += width) {
      float* row = box + z * step_z + y * step_y;
      for (Int x = 0; x < width; ++x) row[x] += table[random[x] >> shift];
    }
}

}  // extern "C"
