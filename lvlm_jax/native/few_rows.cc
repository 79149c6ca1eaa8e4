// Products of a few rows with a matrix, as in decoding: float32 rows, and a matrix of float32, bfloat16, float16 or int8.
// Smaller types are converted in registers, so that only their own bytes are read from memory.
//
// Such a product takes as long as reading the matrix once. So each item of work is a contiguous piece of memory, all rows
// are multiplied with what has been loaded into registers, and a thread that is done with a piece takes the next one. The
// order of additions depends only on the shapes, never on the number of threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "for_each.h"
#include "lanes.h"
#include "many_rows.h"
#include "some_rows.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

inline float Sum(Lanes lanes) {
  return Reduced(lanes, [](float a, float b) { return a + b; });
}

// Calls multiply(first row, number of rows) for groups of one to four rows; the number is a compile-time constant.
template <class F>
void InGroups(int64_t rows, const F& multiply) {
  for (int64_t row = 0; row < rows; row += 4) {
    switch (std::min<int64_t>(rows - row, 4)) {
      case 1: multiply(row, std::integral_constant<int, 1>()); break;
      case 2: multiply(row, std::integral_constant<int, 2>()); break;
      case 3: multiply(row, std::integral_constant<int, 3>()); break;
      case 4: multiply(row, std::integral_constant<int, 4>()); break;
    }
  }
}

// ---- w [in, out] ----------------------------------------------------------------------------------------------------

// Sizes of a piece of w. 2048 columns of 128 rows are a megabyte of float32. Pieces have more rows if there would be more
// than about `kPieces` otherwise, because each piece has its own sums, which are added up at the end.
constexpr int64_t kPieceOut = 2048;  // columns
constexpr int64_t kPieceIn = 128;    // rows
constexpr int64_t kPieces = 64;

// y[r, :] += sum over u of x[r, u] w[u, :], for R rows and U channels.
template <int R, int U, class W>
inline void AddChannels(const float* x, int64_t x_stride, const W* w, int64_t w_stride, float* y, int64_t columns) {
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) {
    Lanes sum[R];
    for (int r = 0; r < R; ++r) sum[r] = Load(y + r * columns + column);
    for (int u = 0; u < U; ++u) {
      const Lanes weight = Load(w + u * w_stride + column);
      Ahead(w + (u + U) * w_stride + column);
      for (int r = 0; r < R; ++r) sum[r] += x[r * x_stride + u] * weight;
    }
    for (int r = 0; r < R; ++r) Store(sum[r], y + r * columns + column);
  }
  for (; column < columns; ++column)
    for (int r = 0; r < R; ++r)
      for (int u = 0; u < U; ++u) y[r * columns + column] += x[r * x_stride + u] * Value(w[u * w_stride + column]);
}

constexpr int kChannels = 8;  // rows of w that are multiplied at a time

// y [rows, columns] += x[:, in to end] w[in to end, columns from `out` on].
template <int U, class W>
void AddPiece(const Product<W>& p, int64_t in, int64_t end, int64_t out, float* y, int64_t columns) {
  for (; in + U <= end; in += U)
    InGroups(p.rows, [&](int64_t row, auto group) {
      AddChannels<group(), U>(p.x + row * p.in + in, p.in, p.w + in * p.out + out, p.out, y + row * columns, columns);
    });
  if (in < end) AddPiece<1>(p, in, end, out, y, columns);
}

template <class W>
void MultiplyInOut(ffi::ThreadPool& pool, const Product<W>& p) {
  const int64_t wide = Ceil(p.out, kPieceOut), deep = std::min(Ceil(p.in, kPieceIn), Ceil(kPieces, wide));
  // A buffer of the calling thread. Other threads write sums into it; the calling thread waits until they are done.
  static thread_local std::vector<float> kept;
  if (kept.size() < static_cast<size_t>(deep * p.rows * p.out)) kept.resize(deep * p.rows * p.out);
  float* const sums = kept.data();  // per column of pieces: [deep, rows, columns]
  std::vector<std::atomic<int64_t>> finished(wide);
  ForEach(pool, wide * deep, [&](int64_t item) {
    const int64_t out = item / deep * kPieceOut, columns = std::min(kPieceOut, p.out - out);
    const int64_t in = item % deep * p.in / deep, end = (item % deep + 1) * p.in / deep;
    float* const stack = sums + out * deep * p.rows;
    const int64_t size = p.rows * columns;
    float* y = stack + item % deep * size;
    std::memset(y, 0, size * sizeof(float));
    AddPiece<kChannels>(p, in, end, out, y, columns);
    if (finished[out / kPieceOut].fetch_add(1, std::memory_order_acq_rel) + 1 < deep) return;
    for (int64_t other = 1; other < deep; ++other)
      for (int64_t i = 0; i < size; ++i) stack[i] += stack[other * size + i];
    for (int64_t row = 0; row < p.rows; ++row)
      std::memcpy(p.y + row * p.out + out, stack + row * columns, columns * sizeof(float));
  });
}

// ---- w [out, in] ----------------------------------------------------------------------------------------------------

constexpr int64_t kPieceBytes = 1 << 18;

// y[r, c] = sum over k of x[r, k] w[c, k], for R rows and C outputs.
template <int R, int C, class W>
inline void Dots(const Product<W>& p, int64_t row, int64_t out) {
  const float* x = p.x + row * p.in;
  const W* w = p.w + out * p.in;
  Lanes sum[R][C] = {};
  constexpr int64_t kLine = 64 / sizeof(W);  // numbers in a cache line
  int64_t k = 0;
  const auto add = [&] {
    Lanes value[R];
    for (int r = 0; r < R; ++r) value[r] = Load(x + r * p.in + k);
    for (int c = 0; c < C; ++c) {
      const Lanes weight = Load(w + c * p.in + k);
      for (int r = 0; r < R; ++r) sum[r][c] += value[r] * weight;
    }
    k += kLanes;
  };
  while (k + kLine <= p.in) {
    for (int c = 0; c < C; ++c) Ahead(w + (c + C) * p.in + k);
    for (const int64_t end = k + kLine; k < end;) add();
  }
  while (k + kLanes <= p.in) add();
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float rest = Sum(sum[r][c]);
      for (int64_t left = k; left < p.in; ++left) rest += x[r * p.in + left] * Value(w[c * p.in + left]);
      p.y[(row + r) * p.out + out + c] = rest;
    }
}

template <int R, class W>
void DotsOfPiece(const Product<W>& p, int64_t row, int64_t out, int64_t end) {
  constexpr int C = R < 3 ? 8 : 6;  // R times C sums fit into registers
  for (; out + C <= end; out += C) Dots<R, C>(p, row, out);
  for (; out < end; ++out) Dots<R, 1>(p, row, out);
}

template <class W>
void MultiplyOutIn(ffi::ThreadPool& pool, const Product<W>& p) {
  const int64_t bytes = p.in * static_cast<int64_t>(sizeof(W));
  const int64_t piece = std::max<int64_t>(24, kPieceBytes / bytes / 24 * 24);  // whole groups of 6 and of 8
  ForEach(pool, Ceil(p.out, piece), [&](int64_t item) {
    const int64_t out = item * piece, end = std::min(out + piece, p.out);
    InGroups(p.rows, [&](int64_t row, auto group) { DotsOfPiece<group()>(p, row, out, end); });
  });
}

// ---- one matrix for each group of rows, as in caches of keys and values ----------------------------------------------

template <class W>
void MultiplyEach(ffi::ThreadPool& pool, const Product<W>& all, int64_t count, bool out_first) {
  if (all.rows == 0 || all.out == 0) return;
  ForEach(pool, count, [&](int64_t item) {
    Product<W> p = all;
    p.x += item * p.rows * p.in;
    p.w += item * p.in * p.out;
    p.y += item * p.rows * p.out;
    if (out_first) {
      InGroups(p.rows, [&](int64_t row, auto group) { DotsOfPiece<group()>(p, row, 0, p.out); });
    } else {
      std::memset(p.y, 0, p.rows * p.out * sizeof(float));
      AddPiece<kChannels>(p, 0, p.in, 0, p.y, p.out);
    }
  });
}

// ---- what XLA calls -------------------------------------------------------------------------------------------------

using Rows = ffi::Buffer<ffi::F32, 2>;

template <class W>
void Multiply(ffi::ThreadPool& pool, Rows x, ffi::AnyBuffer w, ffi::Result<Rows> y, bool out_first) {
  const auto of = x.dimensions();
  const Product<W> product{x.typed_data(), static_cast<const W*>(w.untyped_data()), y->typed_data(), of[0], of[1],
                           y->dimensions()[1]};
  if (product.in == 0)
    std::fill_n(product.y, product.rows * product.out, 0.0f);
  else if (product.rows > 0 && product.out > 0 && out_first)
    MultiplyOutIn(pool, product);
  else if (product.rows > kFewRows && product.out > 0 && sizeof(W) > 1)
    MultiplyBlocks(pool, product);
  else if (product.rows > 0 && product.out > 0)
    MultiplyInOut(pool, product);
}

ffi::Error FewRows(ffi::ThreadPool pool, Rows x, ffi::AnyBuffer w, ffi::Result<Rows> y, bool out_first) {
  const auto of = w.dimensions();
  if (of.size() != 2 || of[out_first ? 1 : 0] != x.dimensions()[1] || of[out_first ? 0 : 1] != y->dimensions()[1] ||
      x.dimensions()[0] != y->dimensions()[0])
    return ffi::Error::InvalidArgument("few_rows: the sizes of rows, matrix and result do not agree");
  switch (w.element_type()) {
    case ffi::F32:
      Multiply<float>(pool, x, w, y, out_first);
      return ffi::Error::Success();
    case ffi::BF16:
      Multiply<BFloat16>(pool, x, w, y, out_first);
      return ffi::Error::Success();
    case ffi::F16:
      Multiply<Float16>(pool, x, w, y, out_first);
      return ffi::Error::Success();
    case ffi::S8:
      Multiply<int8_t>(pool, x, w, y, out_first);
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument("few_rows: the matrix must be of float32, bfloat16, float16 or int8");
  }
}

using Groups = ffi::Buffer<ffi::F32, 3>;

ffi::Error EachRows(ffi::ThreadPool pool, Groups x, ffi::AnyBuffer w, ffi::Result<Groups> y, bool out_first) {
  const auto of = w.dimensions(), rows = x.dimensions(), to = y->dimensions();
  if (of.size() != 3 || of[0] != rows[0] || of[0] != to[0] || rows[1] != to[1] || of[out_first ? 2 : 1] != rows[2] ||
      of[out_first ? 1 : 2] != to[2])
    return ffi::Error::InvalidArgument("each_rows: the sizes of rows, matrices and result do not agree");
  const auto multiply = [&](auto* matrices) {
    MultiplyEach(pool, Product<std::remove_pointer_t<decltype(matrices)>>{x.typed_data(), matrices, y->typed_data(), rows[1],
                                                                          rows[2], to[2]},
                 rows[0], out_first);
    return ffi::Error::Success();
  };
  if (w.element_type() == ffi::BF16) return multiply(static_cast<BFloat16*>(w.untyped_data()));
  if (w.element_type() == ffi::F16) return multiply(static_cast<Float16*>(w.untyped_data()));
  return ffi::Error::InvalidArgument("each_rows: the matrices must be of bfloat16 or float16");
}

// Writes columns [..., C, D] into an array [..., S, D] from column `index` on. Writes in place if XLA reuses the array's
// memory for the result. An index past the last column writes nothing.
ffi::Error WriteColumns(ffi::AnyBuffer array, ffi::AnyBuffer columns, ffi::AnyBuffer index,
                        ffi::Result<ffi::AnyBuffer> result) {
  const std::vector<int64_t> of(array.dimensions().begin(), array.dimensions().end());
  const std::vector<int64_t> from(columns.dimensions().begin(), columns.dimensions().end());
  const size_t rank = of.size();
  if (rank < 2 || from.size() != rank || !std::equal(of.begin(), of.end() - 2, from.begin()) ||
      of[rank - 2] < from[rank - 2] || of[rank - 1] != from[rank - 1])
    return ffi::Error::InvalidArgument("write_columns: the sizes of array and columns do not agree");
  int64_t groups = 1;
  for (size_t axis = 0; axis + 2 < rank; ++axis) groups *= of[axis];
  const int64_t stride = of[rank - 2] * of[rank - 1], size = from[rank - 2] * of[rank - 1];
  auto* const to = static_cast<uint16_t*>(result->untyped_data());
  if (to != array.untyped_data()) std::memcpy(to, array.untyped_data(), groups * stride * sizeof(uint16_t));
  int64_t start = *static_cast<const int32_t*>(index.untyped_data());
  if (start >= of[rank - 2]) return ffi::Error::Success();
  start = std::clamp<int64_t>(start, 0, of[rank - 2] - from[rank - 2]);
  const auto* const written = static_cast<const uint16_t*>(columns.untyped_data());
  for (int64_t group = 0; group < groups && size > 0; ++group)
    std::memcpy(to + group * stride + start * of[rank - 1], written + group * size, size * sizeof(uint16_t));
  return ffi::Error::Success();
}

using Map = ffi::Buffer<ffi::F32, 4>;      // [B, heads, rows, channels]
using Numbers = ffi::Buffer<ffi::S32, 2>;  // [B, rows]

// Fills in the sizes and arrays that both passes share; returns an error if the sizes do not agree.
ffi::Error Operands(Map query, Map key, Map value, Numbers begin, Numbers end, Numbers row_label, Numbers row_picture,
                    Numbers row_group, Numbers label, Numbers group, AttentionForward& job) {
  const auto q = query.dimensions(), k = key.dimensions();
  job.of = {q[0], q[1], k[1], q[2], k[2], q[3]};
  const auto is = [](auto dimensions, std::initializer_list<int64_t> sizes) {
    return std::equal(dimensions.begin(), dimensions.end(), sizes.begin(), sizes.end());
  };
  const AttentionSizes& of = job.of;
  bool agree = of.key_heads && of.heads % of.key_heads == 0;
  for (const auto& shape : {k, value.dimensions()}) agree &= is(shape, {of.samples, of.key_heads, of.columns, of.channels});
  for (Numbers rows : {begin, end, row_label, row_picture, row_group}) agree &= is(rows.dimensions(), {of.samples, of.rows});
  for (Numbers columns : {label, group}) agree &= is(columns.dimensions(), {of.samples, of.columns});
  if (!agree)
    return ffi::Error::InvalidArgument("attention: the sizes of queries, keys, values and masks do not agree");
  job.query = query.typed_data();
  job.key = key.typed_data();
  job.value = value.typed_data();
  job.visible = {begin.typed_data(),     end.typed_data(),   row_label.typed_data(), row_picture.typed_data(),
                 row_group.typed_data(), label.typed_data(), group.typed_data(),     0, 0};
  return ffi::Error::Success();
}

ffi::Error Attention(ffi::ThreadPool pool, Map query, Map key, Map value, Numbers begin, Numbers end, Numbers row_label,
                     Numbers row_picture, Numbers row_group, Numbers label, Numbers group, ffi::Result<Map> mixed,
                     ffi::Result<Map> sums) {
  AttentionForward job;
  if (ffi::Error error =
          Operands(query, key, value, begin, end, row_label, row_picture, row_group, label, group, job);
      error.failure())
    return error;
  if (mixed->element_count() != query.element_count() || sums->element_count() * job.of.channels != query.element_count())
    return ffi::Error::InvalidArgument("attention: the sizes of queries and result do not agree");
  job.mixed = mixed->typed_data();
  job.sums = sums->typed_data();
  Attend(pool, job);
  return ffi::Error::Success();
}

ffi::Error AttentionGradients(ffi::ThreadPool pool, Map result, Map level, Map query, Map key, Map value, Map sums,
                              Numbers begin, Numbers end, Numbers row_label, Numbers row_picture, Numbers row_group,
                              Numbers label, Numbers group, ffi::Result<Map> d_query, ffi::Result<Map> d_key,
                              ffi::Result<Map> d_value) {
  AttentionGradient job;
  AttentionForward& forward = job.forward;
  if (ffi::Error error =
          Operands(query, key, value, begin, end, row_label, row_picture, row_group, label, group, forward);
      error.failure())
    return error;
  const AttentionSizes& of = forward.of;
  const auto rows = static_cast<size_t>(of.samples * of.heads * of.rows);
  const auto columns = static_cast<size_t>(of.samples * of.heads * of.columns * of.channels);
  if (result.element_count() != rows * of.channels || level.element_count() != rows || sums.element_count() != rows ||
      d_query->element_count() != rows * of.channels || d_key->element_count() != columns ||
      d_value->element_count() != columns)
    return ffi::Error::InvalidArgument("attention_gradient: the sizes of operands and results do not agree");
  forward.sums = sums.typed_data();
  job.result = result.typed_data();
  job.level = level.typed_data();
  job.query = d_query->typed_data();
  job.key = d_key->typed_data();
  job.value = d_value->typed_data();
  ForEach(pool, of.samples * of.heads, [&](int64_t head) { job.Run(head / of.heads, head % of.heads); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Map>()
                                  .Arg<Map>()
                                  .Arg<Map>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Ret<Map>()
                                  .Ret<Map>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_gradient, AttentionGradients,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Map>()
                                  .Arg<Map>()
                                  .Arg<Map>()
                                  .Arg<Map>()
                                  .Arg<Map>()
                                  .Arg<Map>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Ret<Map>()
                                  .Ret<Map>()
                                  .Ret<Map>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(write_columns, WriteColumns,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(each_rows, EachRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Groups>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<Groups>()
                                  .Attr<bool>("out_first"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(few_rows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Rows>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<Rows>()
                                  .Attr<bool>("out_first"));
