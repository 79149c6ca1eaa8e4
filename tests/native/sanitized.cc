// Products and attention of every kind and of odd sizes, in memory of exactly their size, beside the same in double. Built with
// sanitizers, it ends at the first read or write outside that memory, at undefined behaviour, or at a race.

#include "few_rows.cc"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace {

std::mt19937 generator(0);

// Memory of exactly so many numbers, `shift` numbers behind the place that the allocator aligned; null for none.
template <class T>
struct Exact {
  Exact(int64_t count, int64_t shift) : block(static_cast<T*>(std::malloc((count + shift) * sizeof(T)))) {
    data = count == 0 ? nullptr : block + shift;
  }
  ~Exact() { std::free(block); }
  T* block;
  T* data;
};

float Drawn() { return std::normal_distribution<float>()(generator); }
void Draw(float* to) { *to = Drawn(); }
void Draw(int8_t* to) { *to = static_cast<int8_t>(std::lrint(Drawn() * 40)); }
void Draw(Float16* to) { to->bits = 0x3000 + generator() % 0x0c00 + (generator() % 2 << 15); }
void Draw(BFloat16* to) {
  const float value = Drawn();
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to->bits = static_cast<uint16_t>(bits >> 16);
}

int failures = 0;

template <class W>
void Compare(const float* x, const W* w, const float* y, ffi::DataType type, int64_t rows, int64_t in, int64_t out,
             bool out_first) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < out; ++o) {
      double sum = 0, size = 1;
      for (int64_t i = 0; i < in; ++i) {
        const double part = double(x[r * in + i]) * Value(w[out_first ? o * in + i : i * out + o]);
        sum += part, size += std::abs(part);
      }
      if (std::abs(sum - y[r * out + o]) < 1e-5 * size) continue;
      if (++failures > 10) continue;
      std::printf("%ld rows, %ld x %ld, kind %d: %g, not %g\n", rows, in, out, type, y[r * out + o], sum);
    }
}

template <class W>
void Check(ffi::DataType type, int64_t rows, int64_t in, int64_t out, bool out_first, int64_t shift, int64_t threads) {
  Exact<float> x(rows * in, shift), y(rows * out, shift);
  Exact<W> w(in * out, shift);
  for (int64_t i = 0; i < rows * in; ++i) Draw(x.data + i);
  for (int64_t i = 0; i < in * out; ++i) Draw(w.data + i);
  Rows xs{}, ys{};
  xs.shape = {rows, in}, xs.data = x.data;
  ys.shape = {rows, out}, ys.data = y.data;
  std::vector<int64_t> shape{in, out};
  if (out_first) std::swap(shape[0], shape[1]);
  {
    ffi::ThreadPool pool(threads);
    Multiply<W>(pool, xs, {shape, w.data, type}, {&ys}, out_first);
  }
  if (!FewRows(ffi::ThreadPool(1), xs, {shape, w.data, type}, {&ys}, out_first).said.empty()) ++failures;
  Compare(x.data, w.data, y.data, type, rows, in, out, out_first);
}

// The same of three groups, each with a matrix of its own.
template <class W>
void CheckEach(ffi::DataType type, int64_t rows, int64_t in, int64_t out, bool out_first, int64_t shift, int64_t threads) {
  constexpr int64_t kGroups = 3;
  Exact<float> x(kGroups * rows * in, shift), y(kGroups * rows * out, shift);
  Exact<W> w(kGroups * in * out, shift);
  for (int64_t i = 0; i < kGroups * rows * in; ++i) Draw(x.data + i);
  for (int64_t i = 0; i < kGroups * in * out; ++i) Draw(w.data + i);
  Groups xs{}, ys{};
  xs.shape = {kGroups, rows, in}, xs.data = x.data;
  ys.shape = {kGroups, rows, out}, ys.data = y.data;
  std::vector<int64_t> shape{kGroups, in, out};
  if (out_first) std::swap(shape[1], shape[2]);
  if (!EachRows(ffi::ThreadPool(threads), xs, {shape, w.data, type}, {&ys}, out_first).said.empty()) ++failures;
  for (int64_t group = 0; group < kGroups && rows * in * out > 0; ++group)
    Compare(x.data + group * rows * in, w.data + group * in * out, y.data + group * rows * out, type, rows, in, out,
            out_first);
}

// Two columns of three groups, written at every place of an array of five, and behind it.
void CheckColumns(bool in_place) {
  constexpr int64_t kGroups = 3, kColumns = 5, kNew = 2, kSize = 7;
  for (int32_t start = 0; start <= kColumns; ++start) {
    Exact<uint16_t> array(kGroups * kColumns * kSize, 1), other(kGroups * kColumns * kSize, 1), own(kGroups * kNew * kSize, 1);
    for (int64_t i = 0; i < kGroups * kColumns * kSize; ++i) array.data[i] = 1000 + i;
    for (int64_t i = 0; i < kGroups * kNew * kSize; ++i) own.data[i] = i;
    ffi::AnyBuffer result{{kGroups, kColumns, kSize}, in_place ? array.data : other.data, ffi::BF16};
    const ffi::AnyBuffer from{{kGroups, kColumns, kSize}, array.data, ffi::BF16};
    if (!WriteColumns(from, {{kGroups, kNew, kSize}, own.data, ffi::BF16}, {{}, &start, ffi::F32}, {&result}).said.empty())
      ++failures;
    const int64_t first = start == kColumns ? kColumns : std::min<int64_t>(start, kColumns - kNew);
    for (int64_t i = 0; i < kGroups * kColumns * kSize; ++i) {
      const int64_t group = i / (kColumns * kSize), column = i / kSize % kColumns - first;
      const int64_t want = column >= 0 && column < kNew ? (group * kNew + column) * kSize + i % kSize : 1000 + i;
      if (static_cast<uint16_t*>(result.data)[i] != want) ++failures;
    }
  }
}

// Attention and its gradient for a mask with padding, a window, answers, images and groups, beside the same in double.
void CheckAttention(int64_t heads, int64_t key_heads, int64_t rows, int64_t columns, int64_t channels, int64_t threads) {
  constexpr int64_t kSamples = 2;
  const int64_t of_rows = kSamples * heads * rows, of_columns = kSamples * key_heads * columns, wide = of_rows * channels;
  Exact<float> query(wide, 1), key(of_columns * channels, 1), value(of_columns * channels, 1), mixed(wide, 1);
  Exact<float> sums(of_rows, 1), result(wide, 1), level(of_rows, 1), d_query(wide, 1);
  Exact<float> d_key(kSamples * heads * columns * channels, 1), d_value(kSamples * heads * columns * channels, 1);
  for (Exact<float>* drawn : {&query, &result})
    for (int64_t i = 0; i < wide; ++i) Draw(drawn->data + i);
  for (Exact<float>* drawn : {&key, &value})
    for (int64_t i = 0; i < of_columns * channels; ++i) Draw(drawn->data + i);
  Exact<int32_t> begin(kSamples * rows, 1), end(kSamples * rows, 1), row_label(kSamples * rows, 1);
  Exact<int32_t> row_picture(kSamples * rows, 1), row_group(kSamples * rows, 1);
  Exact<int32_t> label(kSamples * columns, 1), group(kSamples * columns, 1);
  for (int64_t i = 0; i < kSamples * columns; ++i) {
    const int64_t column = i % columns, part = 6 * column / columns;
    label.data[i] = column < 3 * (i / columns) ? -1 : part == 1 ? -2 : part == 3 ? -3 : part > 3 ? part - 3 : 0;
    group.data[i] = column % 3 && (part == 1 || part == 3) ? part : 0;
  }
  for (int64_t i = 0; i < kSamples * rows; ++i) {
    const int64_t column = i % rows + columns - rows, part = 6 * column / columns;
    begin.data[i] = std::max<int64_t>(0, column - columns / 2), end.data[i] = column + 1;
    row_label.data[i] = std::max<int64_t>(0, part - 3), row_picture.data[i] = column % 3;
    row_group.data[i] = column % 3 && (part == 1 || part == 3) ? part : 0;
  }
  const auto map = [](float* data, std::vector<int64_t> shape) {
    Map buffer{};
    buffer.shape = std::move(shape), buffer.data = data;
    return buffer;
  };
  const auto numbers = [](int32_t* data, int64_t count) {
    Numbers buffer{};
    buffer.shape = {kSamples, count}, buffer.data = data;
    return buffer;
  };
  Map q = map(query.data, {kSamples, heads, rows, channels}), k = map(key.data, {kSamples, key_heads, columns, channels});
  Map v = map(value.data, {kSamples, key_heads, columns, channels}), o = map(mixed.data, q.shape);
  Map s = map(sums.data, {kSamples, heads, rows, 1}), g = map(result.data, q.shape), l = map(level.data, s.shape);
  Map dq = map(d_query.data, q.shape), dk = map(d_key.data, {kSamples, heads, columns, channels});
  Map dv = map(d_value.data, dk.shape);
  const Numbers b = numbers(begin.data, rows), e = numbers(end.data, rows), rl = numbers(row_label.data, rows);
  const Numbers rp = numbers(row_picture.data, rows), rg = numbers(row_group.data, rows);
  const Numbers cl = numbers(label.data, columns), cg = numbers(group.data, columns);
  failures += Attention(ffi::ThreadPool(threads), q, k, v, b, e, rl, rp, rg, cl, cg, {&o}, {&s}).failure();

  std::vector<double> want_query(wide), want_key(kSamples * heads * columns * channels), want_value(want_key.size());
  for (int64_t head = 0; head < kSamples * heads; ++head) {
    const int64_t sample = head / heads, shared = sample * key_heads + head % heads / (heads / key_heads);
    for (int64_t row = 0; row < rows; ++row) {
      const float* const x = query.data + (head * rows + row) * channels;
      const float* const d = result.data + (head * rows + row) * channels;
      const int64_t own = sample * rows + row;
      std::vector<double> weight(columns), mean(channels);
      double total = 0, mean_level = 0;
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t at = sample * columns + c;
        const int32_t mark = label.data[at], picture = row_picture.data[own];
        bool sees = begin.data[own] <= c && c < end.data[own];
        if (mark < -1) sees = sees && (picture == 0 || picture == -1 - mark);
        if (mark == -1) sees = false;
        if (mark > 0) sees = sees && mark == row_label.data[own];
        const int32_t mine = row_group.data[own], other = group.data[at];
        if (mine > 0 && other > 0 && mine != other) sees = true;
        double dot = 0;
        for (int64_t i = 0; i < channels; ++i) dot += double(x[i]) * key.data[(shared * columns + c) * channels + i];
        weight[c] = sees ? std::exp(dot / std::sqrt(double(channels))) : 0;
        total += weight[c];
      }
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t i = 0; i < channels; ++i) {
          weight[c] /= i == 0 && total > 0 ? total : 1;
          mean[i] += weight[c] * value.data[(shared * columns + c) * channels + i];
        }
      for (int64_t i = 0; i < channels; ++i) {
        mean_level += mean[i] * d[i];
        failures += !(std::abs(mean[i] - mixed.data[(head * rows + row) * channels + i]) < 1e-4);
      }
      level.data[head * rows + row] = mean_level;
      for (int64_t c = 0; c < columns; ++c) {
        double d_weight = 0;
        for (int64_t i = 0; i < channels; ++i) d_weight += value.data[(shared * columns + c) * channels + i] * double(d[i]);
        const double d_logit = weight[c] * (d_weight - mean_level) / std::sqrt(double(channels));
        for (int64_t i = 0; i < channels; ++i) {
          want_query[(head * rows + row) * channels + i] += d_logit * key.data[(shared * columns + c) * channels + i];
          want_key[(head * columns + c) * channels + i] += d_logit * x[i];
          want_value[(head * columns + c) * channels + i] += weight[c] * d[i];
        }
      }
    }
  }
  failures += AttentionGradients(ffi::ThreadPool(threads), g, l, q, k, v, s, b, e, rl, rp, rg, cl, cg, {&dq}, {&dk}, {&dv})
                  .failure();
  for (int64_t i = 0; i < wide; ++i) failures += !(std::abs(want_query[i] - d_query.data[i]) < 1e-3);
  for (size_t i = 0; i < want_key.size(); ++i) {
    failures += !(std::abs(want_key[i] - d_key.data[i]) < 1e-3);
    failures += !(std::abs(want_value[i] - d_value.data[i]) < 1e-3);
  }
  // A result of another size is refused before anything is read.
  Map wrong = map(nullptr, {kSamples, heads, rows + 1, channels});
  failures += !Attention(ffi::ThreadPool(1), q, k, v, b, e, rl, rp, rg, cl, cg, {&wrong}, {&s}).failure();
}

}  // namespace

int main() {
  for (int64_t rows : {1, 48, 107})
    for (int64_t channels : {1, 7, 40}) CheckAttention(2, 1 + rows % 2, rows, 113, channels, 1 + rows % 3);
  CheckColumns(true);
  CheckColumns(false);
  const int64_t sizes[][2] = {{0, 5},   {5, 0},   {0, 0},      {1, 1},     {5, 3},   {7, 8},
                              {15, 17}, {64, 48}, {130, 1031}, {150, 2070}, {700, 33}};
  for (const auto& [in, out] : sizes)
    for (int64_t rows : {0, 1, 2, 3, 4, 7, 9, 14})
      for (bool out_first : {false, true})
        for (int64_t shift : {0, 1}) {
          const int64_t threads = 1 + rows % 3;
          Check<float>(ffi::F32, rows, in, out, out_first, shift, threads);
          Check<BFloat16>(ffi::BF16, rows, in, out, out_first, shift, threads);
          Check<Float16>(ffi::F16, rows, in, out, out_first, shift, threads);
          CheckEach<BFloat16>(ffi::BF16, rows, in, out, out_first, shift, threads);
          CheckEach<Float16>(ffi::F16, rows, in, out, out_first, shift, threads);
          Check<int8_t>(ffi::S8, rows, in, out, out_first, shift, threads);
        }
  // Sizes that do not agree, and a kind that is not there, are refused before anything is read.
  Rows x{}, y{};
  x.shape = {1, 5}, y.shape = {1, 3}, x.data = y.data = nullptr;
  const ffi::AnyBuffer wrong[] = {{{4, 3}, nullptr, ffi::F32}, {{5, 4}, nullptr, ffi::F32}, {{15}, nullptr, ffi::F32},
                                  {{5, 3}, nullptr, ffi::F64}};
  for (const ffi::AnyBuffer& w : wrong) failures += FewRows(ffi::ThreadPool(1), x, w, {&y}, false).said.empty();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
