// Products of every kind and of odd sizes, in memory of exactly their size, beside the same in double. Built with
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

}  // namespace

int main() {
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
