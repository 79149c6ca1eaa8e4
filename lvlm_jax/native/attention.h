// Attention in float32 whose map is never in memory, and its gradient: blocks of rows meet blocks of columns.
//
// A work item packs the keys and values of one head into panels, so that the inner loops read contiguous memory and keep
// their sums in registers. The order of additions depends only on the shapes, never on the number of threads.
//
// Sources: FlashAttention, arXiv 2205.14135; the exponential's polynomial is that of the Cephes library (expf).

#ifndef LVLM_JAX_NATIVE_ATTENTION_H_
#define LVLM_JAX_NATIVE_ATTENTION_H_

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "for_each.h"
#include "lanes.h"
#include "some_rows.h"

namespace {

constexpr int64_t kRowBlock = 48;     // rows of a block: whole tiles of kTall rows
constexpr int64_t kColumnBlock = 96;  // columns of a block: whole tiles of kTall rows, and whole panels of kPanel columns

// Sizes: B samples, H query heads, K key heads, T rows, S columns, D channels.
struct AttentionSizes {
  int64_t samples, heads, key_heads, rows, columns, channels;
  int64_t Wide() const { return Ceil(channels, kLanes) * kLanes; }  // channels of a padded row
  int64_t ColumnBlocks() const { return Ceil(columns, kColumnBlock); }
  int64_t RowBlocks() const { return Ceil(rows, kRowBlock); }
  float Scale() const { return 1 / std::sqrt(static_cast<float>(channels)); }
};

// The columns that the rows of one sample see. Row t sees column s if begin[t] <= s < end[t] and the label of s is
//   0;
//   k > 0, and row_label[t] is k: a column of answer k;
//   -1 - k < -1, and row_picture[t] is k or 0: a column of image k.
// Label -1 marks columns without a token. Besides, rows and columns of different groups above 0 see each other.
struct Visible {
  const int32_t *begin, *end, *row_label, *row_picture, *row_group, *label, *group;
  int64_t group_begin, group_end;  // all columns of groups

  bool Sees(int64_t row, int64_t column) const {
    const int32_t own = label[column], picture = row_picture[row];
    const bool inside = (begin[row] <= column) & (column < end[row]);
    const bool labelled = (own == 0) | (own == row_label[row]) | ((own < -1) & ((picture == 0) | (own == -1 - picture)));
    return (inside & labelled) | ((group[column] > 0) & (row_group[row] > 0) & (group[column] != row_group[row]));
  }
};

// The first column that any of some rows may see, and the one after the last.
struct Span {
  int64_t begin = INT64_MAX, end = 0;

  Span(const Visible& visible, int64_t row, int64_t rows) {
    for (int64_t r = row; r < row + rows; ++r) {
      if (visible.begin[r] < visible.end[r]) Add(visible.begin[r], visible.end[r]);
      if (visible.row_group[r] > 0 && visible.group_begin < visible.group_end)
        Add(visible.group_begin, visible.group_end);
    }
    begin = std::min(begin, end);
  }
  void Add(int64_t from, int64_t to) {
    begin = std::min(begin, from);
    end = std::max(end, to);
  }
};

inline Lanes All(float value) { return Lanes{} + value; }
inline Lanes Larger(Lanes a, Lanes b) { return a > b ? a : b; }

// e^x for x <= 88; 0 below -87.
inline Lanes Exp(Lanes x) {
  const Lanes inside = Larger(x, All(-87.0f));
  const Lanes shifted = inside * 1.44269504088896341f + 12582912.0f;  // the integer is in the last bits
  const Lanes whole = shifted - 12582912.0f;
  const Lanes rest = (inside - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Lanes sum = All(1.9875691500e-4f);
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const Lanes power = (Lanes)(((IntLanes)shifted << 23) + 0x3f800000);
  return x < -87.0f ? Lanes{} : sum * power;
}

// y[r, :] = (or +=) sum over k of x[r * across + k * along] w[k * stride, :], for kTall rows and V vectors of columns.
template <int V, bool kAdd>
inline void MultiplyTile(const float* x, int64_t across, int64_t along, const float* w, int64_t stride, int64_t deep,
                         float* y, int64_t to_stride) {
  Lanes sum[kTall][V] = {};
  for (int64_t k = 0; k < deep; ++k, x += along, w += stride) {
    Lanes row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = Load(w + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTall; ++r) {
      const float value = x[r * across];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += value * row[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTall; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* const to = y + r * to_stride + v * kLanes;
      Store(kAdd ? Load(to) + sum[r][v] : sum[r][v], to);
    }
}

// y [rows, wide] += x w, where x is a matrix with the strides `across` and `along`, and w [deep, wide].
inline void AddProduct(const float* x, int64_t across, int64_t along, const float* w, int64_t deep, int64_t rows, int64_t wide,
                       float* y) {
  for (int64_t row = 0; row < rows; row += kTall) {
    const float* const from = x + row * across;
    float* const to = y + row * wide;
    int64_t column = 0;
    for (; column + kPanel <= wide; column += kPanel)
      MultiplyTile<2, true>(from, across, along, w + column, wide, deep, to + column, wide);
    if (column < wide) MultiplyTile<1, true>(from, across, along, w + column, wide, deep, to + column, wide);
  }
}

// Logits y [rows, kColumnBlock] = x [rows, wide] times a block of turned columns.
inline void BlockLogits(const float* x, int64_t wide, int64_t channels, const float* turned, int64_t panels, int64_t rows,
                        float* y) {
  for (int64_t row = 0; row < rows; row += kTall)
    for (int64_t panel = 0; panel < panels; ++panel)
      MultiplyTile<2, false>(x + row * wide, wide, 1, turned + panel * channels * kPanel, kPanel, channels,
                             y + row * kColumnBlock + panel * kPanel, kColumnBlock);
}

// Copies [rows, channels] to [padded rows, wide], with zeros around.
inline void PackRows(const float* from, int64_t rows, int64_t channels, int64_t padded, int64_t wide, float* to) {
  for (int64_t row = 0; row < padded; ++row, to += wide) {
    const int64_t own = row < rows ? channels : 0;
    std::memcpy(to, from + row * channels, own * sizeof(float));
    std::memset(to + own, 0, (wide - own) * sizeof(float));
  }
}

// Copies [columns, channels] to panels [padded columns / kPanel, channels, kPanel], with zeros after the last column.
inline void TurnColumns(const float* from, int64_t columns, int64_t channels, int64_t padded, float* to) {
  for (int64_t panel = 0; panel < padded; panel += kPanel, to += channels * kPanel)
    for (int64_t column = 0; column < kPanel; ++column) {
      const float* const own = from + (panel + column) * channels;
      const bool there = panel + column < columns;
      for (int64_t channel = 0; channel < channels; ++channel) to[channel * kPanel + column] = there ? own[channel] : 0;
    }
}

// Whether all of `rows` rows from `row` on see all columns of a block.
inline bool SeesAll(const Visible& visible, int64_t row, int64_t rows, int64_t column, bool labelled) {
  if (labelled) return false;
  for (int64_t r = row; r < row + rows; ++r)
    if (visible.begin[r] > column || visible.end[r] < column + kColumnBlock) return false;
  return true;
}

// For each block of columns, whether it has labels other than 0, or ends before its last column.
inline std::vector<char> LabelledBlocks(const AttentionSizes& of, const Visible& visible) {
  std::vector<char> labelled(of.ColumnBlocks());
  for (int64_t block = 0; block < of.ColumnBlocks(); ++block) {
    const int64_t start = block * kColumnBlock, end = std::min(of.columns, start + kColumnBlock);
    labelled[block] = end < start + kColumnBlock ||
                      std::any_of(visible.label + start, visible.label + end, [](int32_t label) { return label != 0; });
  }
  return labelled;
}

// Sets the logits of a row to minus infinity where it sees no column.
inline void Hide(const AttentionSizes& of, const Visible& visible, int64_t row, int64_t start, float* logits) {
  const int64_t columns = std::min(kColumnBlock, of.columns - start);
  for (int64_t c = 0; c < columns; ++c) logits[c] = visible.Sees(row, start + c) ? logits[c] : -INFINITY;
  for (int64_t c = columns; c < kColumnBlock; ++c) logits[c] = -INFINITY;
}

struct AttentionForward {
  AttentionSizes of;
  const float *query, *key, *value;
  Visible visible;  // of all samples
  float *mixed, *sums;  // sums: the logarithm of each row's sum of exponentials

  Visible Of(int64_t sample) const {
    const int64_t row = sample * of.rows, column = sample * of.columns;
    Visible own{visible.begin + row,     visible.end + row,       visible.row_label + row, visible.row_picture + row,
                visible.row_group + row, visible.label + column, visible.group + column,  0, of.columns};
    while (own.group_begin < own.group_end && own.group[own.group_begin] <= 0) ++own.group_begin;
    while (own.group_begin < own.group_end && own.group[own.group_end - 1] <= 0) --own.group_end;
    return own;
  }

  // Row blocks [first, last) of one query head.
  void Run(int64_t sample, int64_t head, int64_t first, int64_t last) const {
    static thread_local std::vector<float> turned, values, rows(0), logits(kRowBlock * kColumnBlock), sum;
    const int64_t wide = of.Wide(), padded = of.ColumnBlocks() * kColumnBlock;
    const int64_t own = sample * of.heads + head;
    const int64_t shared = sample * of.key_heads + head / (of.heads / of.key_heads);
    const Visible visible = Of(sample);
    // Columns after the last one that these rows see are not packed.
    const Span all(visible, first * kRowBlock, std::min(of.rows, last * kRowBlock) - first * kRowBlock);
    const int64_t used = Ceil(all.end, kColumnBlock) * kColumnBlock, there = std::min(used, of.columns);
    turned.resize(padded * of.channels);
    values.resize(padded * wide);
    rows.resize(kRowBlock * wide);
    sum.resize(kRowBlock * wide);
    TurnColumns(key + shared * of.columns * of.channels, there, of.channels, used, turned.data());
    PackRows(value + shared * of.columns * of.channels, there, of.channels, used, wide, values.data());
    const std::vector<char> labelled = LabelledBlocks(of, visible);
    for (int64_t block = first; block < last; ++block) {
      const int64_t row = block * kRowBlock, count = std::min(kRowBlock, of.rows - row);
      const int64_t whole = Ceil(count, kTall) * kTall;
      PackRows(query + (own * of.rows + row) * of.channels, count, of.channels, whole, wide, rows.data());
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (float& number : rows) number *= of.Scale();
      float largest[kRowBlock], total[kRowBlock] = {};
      std::fill(largest, largest + kRowBlock, -FLT_MAX);
      const Span span(visible, row, count);
      for (int64_t columns = span.begin / kColumnBlock; columns * kColumnBlock < span.end; ++columns) {
        const int64_t start = columns * kColumnBlock, width = std::min(kColumnBlock, of.columns - start);
        BlockLogits(rows.data(), wide, of.channels, turned.data() + start * of.channels, kColumnBlock / kPanel, whole,
                    logits.data());
        const bool sees_all = SeesAll(visible, row, count, start, labelled[columns]);
        for (int64_t r = 0; r < count; ++r) {
          float* const of_row = logits.data() + r * kColumnBlock;
          if (!sees_all) Hide(of, visible, row + r, start, of_row);
          Lanes most = All(largest[r]), added = {};
          for (int64_t c = 0; c < kColumnBlock; c += kLanes) most = Larger(most, Load(of_row + c));
          const float now = Reduced(most, [](float a, float b) { return a > b ? a : b; });
          for (int64_t c = 0; c < kColumnBlock; c += kLanes) {
            const Lanes weight = Exp(Load(of_row + c) - now);
            Store(weight, of_row + c);
            added += weight;
          }
          const float decay = now > largest[r] ? std::exp(largest[r] - now) : 1.0f;
          total[r] = total[r] * decay + Reduced(added, [](float a, float b) { return a + b; });
          largest[r] = now;
          if (decay != 1)
            for (int64_t d = 0; d < wide; d += kLanes) {
              float* const to = sum.data() + r * wide + d;
              Store(Load(to) * decay, to);
            }
        }
        AddProduct(logits.data(), kColumnBlock, 1, values.data() + start * wide, width, whole, wide, sum.data());
      }
      for (int64_t r = 0; r < count; ++r) {
        const float by = total[r] > 0 ? total[r] : 1;
        float* const to = mixed + (own * of.rows + row + r) * of.channels;
        for (int64_t d = 0; d < of.channels; ++d) to[d] = sum[r * wide + d] / by;
        sums[own * of.rows + row + r] = largest[r] + std::log(by);
      }
    }
  }
};

inline void Attend(ffi::ThreadPool& pool, const AttentionForward& job) {
  const int64_t heads = job.of.samples * job.of.heads, blocks = job.of.RowBlocks();
  // A head's rows are divided if there are few heads. Its columns are packed for each part, so parts have many rows.
  const int64_t parts = std::clamp<int64_t>(Ceil(4 * std::max<int64_t>(pool.num_threads(), 1), heads), 1, Ceil(blocks, 8));
  const int64_t each = Ceil(blocks, parts);
  ForEach(pool, heads * parts, [&](int64_t item) {
    const int64_t head = item / parts, part = parts - 1 - item % parts;  // the last rows, with the most columns, first
    const int64_t first = part * each, last = std::min(blocks, first + each);
    if (first < last) job.Run(head / job.of.heads, head % job.of.heads, first, last);
  });
}

struct AttentionGradient {
  AttentionForward forward;  // `mixed` is not used
  const float *result, *level;  // the gradient of the result; per row, the product of that and the result
  float *query, *key, *value;  // the gradients; those of key and value per query head

  void Run(int64_t sample, int64_t head) const {
    static thread_local std::vector<float> rows, results, columns, turned_keys, turned_values, d_rows, d_key, d_value;
    static thread_local std::vector<float> weights(kRowBlock * kColumnBlock), d_logits(kRowBlock * kColumnBlock);
    const AttentionSizes& of = forward.of;
    const int64_t wide = of.Wide(), padded = of.ColumnBlocks() * kColumnBlock, padded_rows = of.RowBlocks() * kRowBlock;
    const int64_t own = sample * of.heads + head;
    const int64_t shared = sample * of.key_heads + head / (of.heads / of.key_heads);
    const Visible visible = forward.Of(sample);
    const float* const keys = forward.key + shared * of.columns * of.channels;
    rows.resize(padded_rows * wide);
    results.resize(padded_rows * wide);
    columns.resize(padded * wide);
    turned_keys.resize(padded * of.channels);
    turned_values.resize(padded * of.channels);
    d_key.resize(kColumnBlock * wide);
    d_value.resize(kColumnBlock * wide);
    d_rows.assign(padded_rows * wide, 0.0f);
    PackRows(forward.query + own * of.rows * of.channels, of.rows, of.channels, padded_rows, wide, rows.data());
    PackRows(result + own * of.rows * of.channels, of.rows, of.channels, padded_rows, wide, results.data());
    PackRows(keys, of.columns, of.channels, padded, wide, columns.data());
    TurnColumns(keys, of.columns, of.channels, padded, turned_keys.data());
    TurnColumns(forward.value + shared * of.columns * of.channels, of.columns, of.channels, padded, turned_values.data());
    const std::vector<char> labelled = LabelledBlocks(of, visible);
    std::vector<Span> spans;
    for (int64_t row = 0; row < of.rows; row += kRowBlock)
      spans.emplace_back(visible, row, std::min(kRowBlock, of.rows - row));
    const float scale = of.Scale();
    for (int64_t start = 0; start < of.columns; start += kColumnBlock) {
      const int64_t width = std::min(kColumnBlock, of.columns - start), whole_columns = Ceil(width, kTall) * kTall;
      std::fill(d_key.begin(), d_key.end(), 0.0f);
      std::fill(d_value.begin(), d_value.end(), 0.0f);
      for (int64_t row = 0; row < of.rows; row += kRowBlock) {
        const Span& span = spans[row / kRowBlock];
        if (span.end <= start || span.begin >= start + kColumnBlock) continue;
        const int64_t count = std::min(kRowBlock, of.rows - row), whole = Ceil(count, kTall) * kTall;
        const float *const of_rows = rows.data() + row * wide, *const of_results = results.data() + row * wide;
        const int64_t panels = kColumnBlock / kPanel;
        BlockLogits(of_rows, wide, of.channels, turned_keys.data() + start * of.channels, panels, whole, weights.data());
        BlockLogits(of_results, wide, of.channels, turned_values.data() + start * of.channels, panels, whole,
                    d_logits.data());
        const bool sees_all = SeesAll(visible, row, count, start, labelled[start / kColumnBlock]);
        for (int64_t r = 0; r < count; ++r) {
          float* const weight = weights.data() + r * kColumnBlock;
          float* const d_logit = d_logits.data() + r * kColumnBlock;
          if (!sees_all) Hide(of, visible, row + r, start, weight);
          const float total = forward.sums[own * of.rows + row + r], mean = level[own * of.rows + row + r];
          for (int64_t c = 0; c < kColumnBlock; c += kLanes) {
            const Lanes lanes = Exp(Load(weight + c) * scale - total);
            Store(lanes, weight + c);
            Store(lanes * (Load(d_logit + c) - mean) * scale, d_logit + c);
          }
        }
        AddProduct(weights.data(), 1, kColumnBlock, of_results, count, whole_columns, wide, d_value.data());
        AddProduct(d_logits.data(), 1, kColumnBlock, of_rows, count, whole_columns, wide, d_key.data());
        AddProduct(d_logits.data(), kColumnBlock, 1, columns.data() + start * wide, width, whole, wide,
                   d_rows.data() + row * wide);
      }
      for (int64_t c = 0; c < width; ++c) {
        const int64_t to = (own * of.columns + start + c) * of.channels;
        std::memcpy(key + to, d_key.data() + c * wide, of.channels * sizeof(float));
        std::memcpy(value + to, d_value.data() + c * wide, of.channels * sizeof(float));
      }
    }
    for (int64_t row = 0; row < of.rows; ++row)
      std::memcpy(query + (own * of.rows + row) * of.channels, d_rows.data() + row * wide, of.channels * sizeof(float));
  }
};

}  // namespace

#endif  // LVLM_JAX_NATIVE_ATTENTION_H_
