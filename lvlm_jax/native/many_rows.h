// Products of many rows with a matrix in AMX tiles, for prompts and training on CPUs with AMX. XLA has no code for these
// tiles, which multiply bfloat16 and add in float32.
//
// bfloat16 represents every int8 exactly, and a float32 is the sum of three bfloat16. So the product of float32 rows with
// an int8 matrix takes three tile products and loses no digit. (A float32 matrix would take six, which are slower than
// vectors of float32.) The order of additions depends only on the shapes.

#ifndef LVLM_JAX_NATIVE_MANY_ROWS_H_
#define LVLM_JAX_NATIVE_MANY_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "for_each.h"
#include "lanes.h"
#include "xla/ffi/api/ffi.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define LVLM_JAX_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ffi = xla::ffi;

#ifdef LVLM_JAX_TILES
namespace {

constexpr int64_t kSide = 16;           // rows of a tile, and its columns in float32
constexpr int64_t kBlock = 2 * kSide;   // rows, columns and channels per block; bfloat16 numbers in a tile's row
constexpr int64_t kTile = kSide * kBlock;
constexpr int64_t kDepth = 1024;        // channels that are summed in tiles before the sums are added up
constexpr int64_t kWide = 8;            // at most this many blocks of columns use the rows that were read

struct alignas(64) Shape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The number of bfloat16 whose sum is a number of type T.
template <class T>
constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;

inline __m512i Narrow(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Splits 32 numbers into parts of 32 bfloat16 whose sum they are, the largest part first. Infinity becomes NaN.
inline void Split(const BFloat16* from, __m512i* parts) { parts[0] = _mm512_loadu_si512(from); }
inline void Split(const int8_t* from, __m512i* parts) {
  parts[0] = Narrow((__m512)Load(from), (__m512)Load(from + kSide));
}
inline void Split(const float* from, __m512i* parts) {
  __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + kSide);
  for (int part = 0; part < kParts<float>; ++part) {
    parts[part] = Narrow(low, high);
    low -= _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(parts[part])), 16));
    high -= _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(parts[part], 1)), 16));
  }
}

template <class W>
inline __m512i Halves(const W* from) {
  __m512i part;
  Split(from, &part);
  return part;
}

// Packs channels [0, deep) and 32 columns of w [in, out] into tiles, with pairs of channels interleaved.
template <class W>
void PackInOut(const W* w, int64_t out, int64_t deep, uint16_t* packed) {
  const auto pairs = [](__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  };
  for (int64_t k = 0; k < deep; k += 2) {
    const __m512i even = Halves(w + k * out), odd = Halves(w + (k + 1) * out);
    uint16_t* to = packed + k / kBlock * 2 * kTile + k % kBlock / 2 * kBlock;
    _mm512_storeu_si512(to, pairs(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd)));
    _mm512_storeu_si512(to + kTile, pairs(_mm512_extracti64x4_epi64(even, 1), _mm512_extracti64x4_epi64(odd, 1)));
  }
}

// The same for w [out, in], where it is a transpose of pairs.
template <class W>
void PackOutIn(const W* w, int64_t in, int64_t deep, uint16_t* packed) {
  const __m512i column = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32(kSide));
  alignas(64) uint32_t pairs[kSide * kSide];
  for (int64_t k = 0; k < deep; k += kBlock)
    for (int64_t half = 0; half < 2; ++half, packed += kTile) {
      for (int64_t line = 0; line < kSide; ++line)
        _mm512_store_si512(pairs + line * kSide, Halves(w + (half * kSide + line) * in + k));
      for (int64_t pair = 0; pair < kSide; ++pair)
        _mm512_storeu_si512(packed + pair * kBlock, _mm512_i32gather_epi32(column, pairs + pair, 4));
    }
}

// Sums of 32 rows and 32 columns over `deep` channels, as four tiles of float32. Parts of rows lie `stride` apart.
template <int kOfRows>
inline void Meet(const uint16_t* rows, int64_t in, int64_t stride, const uint16_t* tiles, int64_t deep, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < deep; k += kBlock, tiles += 2 * kTile) {
    _tile_loadd(6, tiles, 64);
    _tile_loadd(7, tiles + kTile, 64);
    for (int part = 0; part < kOfRows; ++part) {
      const uint16_t* from = rows + part * stride + k;
      _tile_loadd(4, from, in * sizeof(uint16_t));
      _tile_loadd(5, from + kSide * in, in * sizeof(uint16_t));
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kSide * kSide, 64);
  _tile_stored(2, sums + 2 * kSide * kSide, 64);
  _tile_stored(3, sums + 3 * kSide * kSide, 64);
}

inline void Write(__m512 left, __m512 right, float* to) {
  _mm512_storeu_ps(to, left);
  _mm512_storeu_ps(to + kSide, right);
}
inline void Write(__m512 left, __m512 right, BFloat16* to) { _mm512_storeu_si512(to, Narrow(left, right)); }

// y [rows, out] = x [rows, in] times w.
template <class X, class W, class Y>
void MultiplyTiles(ffi::ThreadPool& pool, const X* x, const W* w, Y* y, int64_t rows, int64_t in, int64_t out,
                   bool out_first) {
  constexpr int kOfRows = kParts<X>;
  // Whole blocks of bfloat16 rows are read in place; a last, incomplete block is copied and padded with zeros.
  const int64_t whole = kOfRows == 1 ? rows / kBlock : 0, blocks = Ceil(rows, kBlock), stride = (blocks - whole) * kBlock * in;
  static thread_local std::vector<uint16_t> kept;  // of the calling thread, which waits for the threads that use it
  if (kept.size() < static_cast<size_t>(kOfRows * stride)) kept.resize(kOfRows * stride);
  uint16_t* const split = kept.data();
  const auto copy = [&](int64_t block) {
    for (int64_t row = block * kBlock; row < (block + 1) * kBlock; ++row)
      for (int64_t k = 0; k < in; k += kBlock) {
        __m512i parts[kOfRows] = {};
        if (row < rows) Split(x + row * in + k, parts);
        for (int part = 0; part < kOfRows; ++part)
          _mm512_storeu_si512(split + part * stride + (row - whole * kBlock) * in + k, parts[part]);
      }
  };
  if (blocks - whole > 1)
    ForEach(pool, blocks, copy);
  else if (blocks > whole)
    copy(whole);
  // The columns of an item fit into the second-level cache, and there are about two items per thread, or more.
  const int64_t share = Ceil(out / kBlock, 2 * std::max<int64_t>(pool.num_threads(), 1));
  const int64_t wide = std::min(kWide, share) * kBlock;
  ForEach(pool, Ceil(out, wide), [&](int64_t item) {
    static const Shape shape;
    static thread_local std::vector<uint16_t> packed;
    static thread_local std::vector<float> total;
    const int64_t first = item * wide, columns = std::min(wide, out - first);
    packed.resize(kDepth * columns);
    total.resize(blocks * kBlock * columns);
    alignas(64) float sums[4 * kSide * kSide];
    _tile_loadconfig(&shape);
    for (int64_t k = 0; k < in; k += kDepth) {
      const int64_t deep = std::min(kDepth, in - k);
      for (int64_t column = 0; column < columns; column += kBlock) {
        uint16_t* to = packed.data() + column * kDepth;
        if (out_first)
          PackOutIn(w + (first + column) * in + k, in, deep, to);
        else
          PackInOut(w + k * out + first + column, out, deep, to);
      }
      for (int64_t row = 0; row < rows; row += kBlock) {
        const auto* lying = reinterpret_cast<const uint16_t*>(x) + row * in;
        const uint16_t* from = row < whole * kBlock ? lying : split + (row - whole * kBlock) * in;
        for (int64_t column = 0; column < columns; column += kBlock) {
          Meet<kOfRows>(from + k, in, stride, packed.data() + column * kDepth, deep, sums);
          float* sum = total.data() + row * columns + column;
          for (int64_t line = 0; line < std::min(kBlock, rows - row); ++line, sum += columns) {
            const float* part = sums + line / kSide * 2 * kSide * kSide + line % kSide * kSide;
            __m512 left = _mm512_load_ps(part), right = _mm512_load_ps(part + kSide * kSide);
            if (k > 0) left += _mm512_loadu_ps(sum), right += _mm512_loadu_ps(sum + kSide);
            if (k + deep < in)
              Write(left, right, sum);
            else
              Write(left, right, y + (row + line) * out + first + column);
          }
        }
      }
    }
    _tile_release();
  });
}

}  // namespace
#endif

// Whether the processor and the operating system let this process use AMX tiles.
extern "C" bool many_rows_ready() {
#ifdef LVLM_JAX_TILES
  constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

static ffi::Error ManyRows(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y,
                           bool out_first) {
#ifdef LVLM_JAX_TILES
  const auto of = w.dimensions(), from = x.dimensions(), to = y->dimensions();
  if (of.size() != 2 || from.size() != 2 || to.size() != 2 || of[out_first ? 1 : 0] != from[1] ||
      of[out_first ? 0 : 1] != to[1] || from[0] != to[0] || from[1] % kBlock || to[1] % kBlock)
    return ffi::Error::InvalidArgument("many_rows: the sizes of rows, matrix and result do not agree");
  const auto multiply = [&](auto* rows, auto* matrix, auto* result) {
    MultiplyTiles(pool, rows, matrix, result, from[0], from[1], to[1], out_first);
    return ffi::Error::Success();
  };
  void *const a = x.untyped_data(), *const b = w.untyped_data(), *const c = y->untyped_data();
  const ffi::DataType kinds[] = {x.element_type(), w.element_type(), y->element_type()};
  const auto are = [&](ffi::DataType one, ffi::DataType two, ffi::DataType three) {
    return kinds[0] == one && kinds[1] == two && kinds[2] == three;
  };
  if (are(ffi::BF16, ffi::BF16, ffi::BF16))
    return multiply(static_cast<BFloat16*>(a), static_cast<BFloat16*>(b), static_cast<BFloat16*>(c));
  if (are(ffi::BF16, ffi::S8, ffi::F32))
    return multiply(static_cast<BFloat16*>(a), static_cast<int8_t*>(b), static_cast<float*>(c));
  if (are(ffi::F32, ffi::S8, ffi::F32))
    return multiply(static_cast<float*>(a), static_cast<int8_t*>(b), static_cast<float*>(c));
  return ffi::Error::InvalidArgument("many_rows: products of these kinds of numbers are not here");
#else
  return ffi::Error::InvalidArgument("many_rows: compiled without AMX");
#endif
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(many_rows, ManyRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("out_first"));

#endif  // LVLM_JAX_NATIVE_MANY_ROWS_H_
