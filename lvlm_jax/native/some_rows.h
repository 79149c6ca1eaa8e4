// Products of more than a few rows with a matrix [in, out], as in short prompts. They are bound by arithmetic, not by
// memory: a piece of the matrix stays in the caches while it is multiplied with many rows.
//
// Each sum over channels is split into short sums, which are then added. XLA adds all channels one after another, and its
// rounding error is twice as large.

#ifndef LVLM_JAX_NATIVE_SOME_ROWS_H_
#define LVLM_JAX_NATIVE_SOME_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "for_each.h"
#include "lanes.h"

namespace {

constexpr int64_t kFewRows = 8;              // up to this many rows, reading the matrix takes most of the time
constexpr int64_t kTall = kLanes > 8 ? 12 : 6;  // rows per tile: their sums over two vectors of columns fit into registers
constexpr int64_t kShort = 4;                // rows per tile for the last rows
constexpr int64_t kPanel = 2 * kLanes;       // columns per tile
constexpr int64_t kPanels = 16;              // most panels in a piece of the matrix
constexpr int64_t kSum = 48;                 // channels in a short sum

// y[r, :] += sum over k of x[k, r] w[k, :], for the first `rows` of R rows.
template <int R>
inline void AddTile(const float* x, const float* w, int64_t deep, float* y, int64_t stride, int64_t rows) {
  Lanes sum[R][2] = {};  // in registers, if the compiler unrolls all loops over rows
  for (int64_t k = 0; k < deep; ++k) {
    const Lanes left = Load(w + k * kPanel), right = Load(w + k * kPanel + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float value = x[k * R + r];
      sum[r][0] += value * left;
      sum[r][1] += value * right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, y += stride)
    if (r < rows) {
      Store(Load(y) + sum[r][0], y);
      Store(Load(y + kLanes) + sum[r][1], y + kLanes);
    }
}

// Rows of the next tile when `left` rows remain.
inline int64_t Together(int64_t left) { return left > kTall - kShort ? kTall : kShort; }

// Transposes rows [row, row + Together) of x to [channel, row], with zeros after the last row.
template <class W>
void TurnRows(const Product<W>& p, int64_t row, float* turned) {
  const int64_t left = p.rows - row, together = Together(left);
  const float* const x = p.x + row * p.in;
  for (int64_t k = 0; k < p.in; ++k)
    for (int64_t r = 0; r < together; ++r) turned[k * together + r] = r < left ? x[r * p.in + k] : 0;
}

// Copies channels [k, k + deep) of a piece's columns as float32, panel by panel, with zeros after the last column.
template <class W>
void PackPiece(const Product<W>& p, int64_t k, int64_t deep, int64_t out, int64_t columns, float* piece) {
  for (int64_t row = 0; row < deep; ++row) {
    const W* from = p.w + (k + row) * p.out + out;
    for (int64_t column = 0; column < columns; column += kLanes) {
      float* to = piece + (column / kPanel * kSum + row) * kPanel + column % kPanel;
      if (column + kLanes <= columns) {
        Ahead(from + kSum * p.out + column);  // channels that are packed next
        Store(Load(from + column), to);
        continue;
      }
      for (int64_t lane = 0; lane < kLanes; ++lane) to[lane] = column + lane < columns ? Value(from[column + lane]) : 0;
    }
    if (columns % kPanel && columns % kPanel <= kLanes)
      std::memset(piece + (columns / kPanel * kSum + row) * kPanel + kLanes, 0, kLanes * sizeof(float));
  }
}

template <class W>
void MultiplyBlocks(ffi::ThreadPool& pool, const Product<W>& p) {
  // A buffer of the calling thread. Other threads use it too; the calling thread waits until they are done.
  static thread_local std::vector<float> rows;
  if (rows.size() < static_cast<size_t>((p.rows + kTall) * p.in)) rows.resize((p.rows + kTall) * p.in);
  float* const turned = rows.data();
  ForEach(pool, Ceil(p.rows, kTall), [&](int64_t group) {
    const int64_t end = std::min(p.rows, (group + 1) * kTall);
    for (int64_t row = group * kTall; row < end; row += Together(p.rows - row)) TurnRows(p, row, turned + row * p.in);
  });
  // About two pieces per thread, or more. The width of a piece changes no sum.
  const int64_t share = Ceil(Ceil(p.out, kPanel), 2 * std::max<int64_t>(pool.num_threads(), 1));
  const int64_t wide = std::min(kPanels, share) * kPanel;
  ForEach(pool, Ceil(p.out, wide), [&](int64_t item) {
    static thread_local std::vector<float> piece(kPanels * kPanel * kSum), kept;
    const int64_t out = item * wide, columns = std::min(wide, p.out - out), panels = Ceil(columns, kPanel);
    // A piece of whole panels is summed directly in the result.
    const bool whole = columns % kPanel == 0;
    const int64_t stride = whole ? p.out : panels * kPanel;
    if (!whole) kept.resize(p.rows * stride);
    float* const y = whole ? p.y + out : kept.data();
    for (int64_t row = 0; row < p.rows; ++row) std::memset(y + row * stride, 0, panels * kPanel * sizeof(float));
    for (int64_t k = 0; k < p.in; k += kSum) {
      const int64_t deep = std::min(kSum, p.in - k);
      PackPiece(p, k, deep, out, columns, piece.data());
      for (int64_t row = 0, together; row < p.rows; row += together) {
        const int64_t left = p.rows - row;
        together = Together(left);
        const float* x = turned + row * p.in + k * together;
        for (int64_t panel = 0; panel < panels; ++panel) {
          const float* w = piece.data() + panel * kSum * kPanel;
          float* to = y + row * stride + panel * kPanel;
          together == kTall ? AddTile<kTall>(x, w, deep, to, stride, left) : AddTile<kShort>(x, w, deep, to, stride, left);
        }
      }
    }
    if (whole) return;
    for (int64_t row = 0; row < p.rows; ++row)
      std::memcpy(p.y + row * p.out + out, y + row * stride, columns * sizeof(float));
  });
}

}  // namespace

#endif  // LVLM_JAX_NATIVE_SOME_ROWS_H_
