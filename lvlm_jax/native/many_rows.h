// Products of many rows with a matrix, both bfloat16, in the tiles of AMX: what prompts and training take on CPUs that
// have it. XLA has no code for these tiles. Sums are float32, in an order that the shapes decide.

#ifndef LVLM_JAX_NATIVE_MANY_ROWS_H_
#define LVLM_JAX_NATIVE_MANY_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "for_each.h"
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

constexpr int64_t kSide = 16;            // rows of a tile, and columns of float32
constexpr int64_t kDeep = 32;            // bfloat16 of a tile's row
constexpr int64_t kBlock = 2 * kSide;    // rows and columns that are summed at a time: two tiles each
constexpr int64_t kTile = kSide * kDeep;

struct alignas(64) Shape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles of columns [column, column + 32) of w, which is [in, out]: pairs of rows, interleaved.
void PackInOut(const uint16_t* w, int64_t in, int64_t out, int64_t column, uint16_t* packed) {
  for (int64_t k = 0; k < in; k += kDeep)
    for (int64_t half = 0; half < 2; ++half, packed += kTile)
      for (int64_t pair = 0; pair < kSide; ++pair) {
        const uint16_t* from = w + (k + 2 * pair) * out + column + half * kSide;
        const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + out)));
        _mm512_storeu_si512(packed + pair * kDeep, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
}

// The same of w that is [out, in]: a transpose of pairs.
void PackOutIn(const uint16_t* w, int64_t in, int64_t out, int64_t column, uint16_t* packed) {
  const __m512i lanes = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                           _mm512_set1_epi32(static_cast<int>(in)));
  for (int64_t k = 0; k < in; k += kDeep)
    for (int64_t half = 0; half < 2; ++half, packed += kTile) {
      const uint16_t* from = w + (column + half * kSide) * in + k;
      for (int64_t pair = 0; pair < kSide; ++pair)
        _mm512_storeu_si512(packed + pair * kDeep, _mm512_i32gather_epi32(lanes, from + 2 * pair, 2));
    }
}

void Columns(const uint16_t* x, const uint16_t* w, uint16_t* y, int64_t rows, int64_t in, int64_t out, bool out_first,
             int64_t column) {
  static thread_local std::vector<uint16_t> kept, rest;
  kept.resize(in * kBlock);
  (out_first ? PackOutIn : PackInOut)(w, in, out, column, kept.data());
  alignas(64) float sums[4][kSide * kSide];
  for (int64_t row = 0; row < rows; row += kBlock) {
    const uint16_t* from = x + row * in;
    const int64_t here = std::min(kBlock, rows - row);
    if (here < kBlock) {  // the last rows, with zeros behind them
      rest.assign(in * kBlock, 0);
      std::memcpy(rest.data(), from, here * in * sizeof(uint16_t));
      from = rest.data();
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const uint16_t* tiles = kept.data();
    for (int64_t k = 0; k < in; k += kDeep, tiles += 2 * kTile) {
      _tile_loadd(4, from + k, in * sizeof(uint16_t));
      _tile_loadd(5, from + kSide * in + k, in * sizeof(uint16_t));
      _tile_loadd(6, tiles, 64);
      _tile_loadd(7, tiles + kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (int64_t line = 0; line < here; ++line) {
      const float* left = sums[line / kSide * 2] + line % kSide * kSide;
      const __m512bh narrow = _mm512_cvtne2ps_pbh(_mm512_load_ps(left + kSide * kSide), _mm512_load_ps(left));
      std::memcpy(y + (row + line) * out + column, &narrow, 64);
    }
  }
}

}  // namespace
#endif

// Whether this processor and this system let the process use tiles.
extern "C" bool many_rows_ready() {
#ifdef LVLM_JAX_TILES
  constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

using Halves = ffi::Buffer<ffi::BF16, 2>;

static ffi::Error ManyRows(ffi::ThreadPool pool, Halves x, Halves w, ffi::Result<Halves> y, bool out_first) {
#ifdef LVLM_JAX_TILES
  const int64_t rows = x.dimensions()[0], in = x.dimensions()[1], out = y->dimensions()[1];
  if (w.dimensions()[out_first ? 1 : 0] != in || w.dimensions()[out_first ? 0 : 1] != out || in % kDeep || out % kBlock)
    return ffi::Error::InvalidArgument("many_rows: the sizes of rows, matrix and result do not agree");
  const auto* from = reinterpret_cast<const uint16_t*>(x.untyped_data());
  const auto* matrix = reinterpret_cast<const uint16_t*>(w.untyped_data());
  auto* to = reinterpret_cast<uint16_t*>(y->untyped_data());
  ForEach(pool, out / kBlock, [&](int64_t item) {
    static const Shape shape;
    _tile_loadconfig(&shape);
    Columns(from, matrix, to, rows, in, out, out_first, item * kBlock);
    _tile_release();
  });
  return ffi::Error::Success();
#else
  return ffi::Error::InvalidArgument("many_rows: compiled without AMX");
#endif
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(many_rows, ManyRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Halves>()
                                  .Arg<Halves>()
                                  .Ret<Halves>()
                                  .Attr<bool>("out_first"));

#endif  // LVLM_JAX_NATIVE_MANY_ROWS_H_
