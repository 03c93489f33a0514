// The kernel, once for every instruction set: each few_rows_<isa>.cpp names its set, includes this file, and describes
// its registers in an `Ops<T>` for every storage type T:
//
//   Copy            what x's copy and the latents are stored as
//   Vector          fp32 accumulators; Operand: what is multiplied
//   kStep           elements of a row in one Operand
//   kPair           rows of W in one Operand of the decode product: 1, or 2 where an instruction adds two products
//   kColumnVectors  Vectors across one decode tile, kTile = kColumnVectors × lanes columns wide
//   kEncodeX × kEncodeW, kDecodeX × kColumnVectors
//                   accumulators of the two inner loops, for so many rows of x; they have to fit the registers
//   kPacks          whether 16-bit columns are converted once for all decode tiles and kept, not by each anew; ms of
//                   both: 26 and 33 of bf16 at N 64 with four lanes, 1.06 and 0.80 of fp16 at N 8 with sixteen
//
//   load(T*), load(Copy*), multiply_add(Operand, Operand, Vector), load_sum(float*), store_sum(float*, Vector)
//   sums<kCount>(vectors, out)    the sum over the lanes of each Vector
//   columns(rows, k, out)         columns [k, k + kTile) of kPair rows of W, as kColumnVectors Operands
//   broadcast(latents)            kPair latents in every lane
//   latent(float)                 a latent as stored
//   wait()                        until the loads begun before are done, where there is an instruction for it
//
// Everything is in an anonymous namespace and calls no inline function of another library: a function with external
// linkage, compiled here for AVX-512, could be the copy that the linker keeps for every caller.
#pragma once

#include "few_rows.h"
#include "numbers.h"

namespace tiedfused::cpu {
namespace {

// Most rows of W at a time. Once a block, y's part is read and written: with 32 rows, bf16, d 768, N 16 and 32 took up
// to 2.8 and 4.7 ms, with 64 2.3 and 3.9.
constexpr int kBlock = 64;
constexpr int kStride = kBlock + 8;  // of a row of x's latents: the last tile of the encode product may reach beyond
// Few rows of x are bound by reading W, and like smaller blocks: two cores, W of 150 and 270 MB in fp32, N 1, ms with
// blocks of 8, 16 and 32 rows: 3.7, 3.6, 4.2 and 7.8, 9.0, 9.3.
template <typename T>
constexpr int kSmallBlock = sizeof(T) == 4 ? 8 : 16;
constexpr int kRowsOfSmallBlock = 4;
// For so many rows of x the next block is asked for at every step of the inner loops; with more, once a tile of the
// decode product: there it is arithmetic that has to be kept busy. With fewer too: they leave the caches' own
// prefetcher time to follow the encode product. Two cores, W of 100 to 300 MB, ms of every step and of the other: fp32,
// d 2304, N 1, 2, 4: 3.17 and 2.80, 3.29 and 3.10, 3.57 and 4.05; N 8 and 16, with smaller tiles than today's: 5.3
// and 7.3, 8.2 and 9.6; bf16, d 768, N 64: 10.7 and 9.7.
constexpr int kFewestOfOften = 3, kMostOfOften = 16;
// A block of W, and the next one on its way, should fit in L2 beside x and y's part. 1 MiB on the CPU it was tuned on.
constexpr int64_t kBlockBytes = 320 << 10;
// The encode product goes over W's columns in panels, so that the rows of x stay in L1 while the block's rows
// pass: without panels it ran at two thirds of the speed for d 2304 in fp32, where four rows of x and of W are 72 KiB.
constexpr int64_t kPanelBytes = 16 << 10;

// With 16 lanes one row of x has a way of its own, `part_of_one`: two rows of W at a time while they, the two before, x
// and y fit in L1, else four. What it gains is in csrc/README.md. Rows of W of more bytes than these gain nothing or
// lose: fp32 at d 2304 and 4096, bf16 at d 8192 up to a tenth. So do short rows, and a W that caches may hold; the time
// of blocks over its, one thread, W in the caches: d 64 0.3 to 0.4 in bf16 and 0.6 in fp32, bf16 d 512 0.65, d 768 of
// 4 MB 0.83, but 1.22 where caches are cold.
constexpr int64_t kMostBytesOfTwo = 5 << 10, kMostBytesOfFour = 12 << 10;
constexpr int64_t kLeastBytesOfOne = 1536, kLeastWeightOfOne = 8 << 20;
// Bytes of W that it asks for ahead: 4 KiB were up to a quarter slower, 12 no faster.
constexpr int64_t kAhead = 8 << 10;
// And so far ahead a line of each page: where a page is takes longer to find out than its lines to arrive. Two cores,
// bf16, N 1, ms without and with, medians of interleaved calls in several runs: d 2304 1.71 and 1.60, 2.04 and 1.89,
// 2.39 and 2.27, d 768 1.10 and 1.03, d 1536 1.41 and 1.27; d 4096 the same within 2%. 32 and 96 KiB were no different.
constexpr int64_t kPagesAhead = 64 << 10, kPage = 4 << 10;

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int kMost, typename F>
inline void with_constant(int64_t count, F&& f) {
  if constexpr (kMost == 1) {
    f.template operator()<1>();
  } else if (count >= kMost) {
    f.template operator()<kMost>();
  } else {
    with_constant<kMost - 1>(count, f);
  }
}

// f.operator()<kCount>(i) for [i, i + kCount) from 0 to n, every kCount at most kMost, and all of nearly the same size.
template <int kMost, typename F>
inline void in_tiles(int64_t n, F&& f) {
  int64_t i = 0;
  for (int64_t tiles = up(n, kMost); tiles > 0; --tiles) {
    with_constant<kMost>(up(n - i, tiles), [&]<int kCount>() {
      f.template operator()<kCount>(i);
      i += kCount;
    });
  }
}

// Asks for the next block of W while one is computed with, `bytes_a_step` at every step: asked for all at once, its
// lines fill the core's queue of misses and stop it, and memory idles afterwards.
class Prefetch {
 public:
  Prefetch(const void* first, int64_t row_bytes, int64_t stride_bytes, int64_t rows, int64_t steps)
      : at_(static_cast<const char*>(first)),
        end_(at_ + row_bytes),
        row_bytes_(row_bytes),
        stride_bytes_(stride_bytes),
        rows_(rows) {
    if (rows > 0) bytes_a_step_ = up(up(row_bytes, kLine) * kLine * rows, steps);
  }

  void step() {
    int64_t due = due_ + bytes_a_step_;  // in registers: with the members themselves N 1 took a tenth longer
    const char* at = at_;
    for (; due >= kLine; due -= kLine) {
      __builtin_prefetch(at, 0, 2);
      at += kLine;
      if (at >= end_) {
        end_ += stride_bytes_;
        at = end_ - row_bytes_;
        if (--rows_ == 0) bytes_a_step_ = due = 0;
      }
    }
    due_ = due;
    at_ = at;
  }

 private:
  static constexpr int64_t kLine = 64;

  const char *at_, *end_;  // of the row in hand
  int64_t row_bytes_, stride_bytes_, rows_, bytes_a_step_ = 0, due_ = 0;
};

// Rows of W in an encode tile of kX rows of x: with half of them or less, twice as many.
template <typename O, int kX>
constexpr int kEncodeW = 2 * kX <= O::kEncodeX ? 2 * O::kEncodeW : O::kEncodeW;

// pre[i * kStride + j] += Σₖ xᵢₖ Wⱼₖ over `size` columns, for kX rows of x and kEncodeW of W. The first of the columns
// is x[0], and rows[j][column].
template <typename O, int kX, bool kOften, typename T>
inline void encode_tile(const typename O::Copy* x, int64_t x_stride, const T* const* rows, int64_t column, int64_t size,
                        float* pre, Prefetch& next) {
  constexpr int kW = kEncodeW<O, kX>;
  typename O::Vector sums[kX][kW] = {};
  for (int64_t k = 0; k < size; k += O::kStep) {
    if constexpr (kOften) next.step();
    if constexpr (kX < kW) {  // the fewer stay in registers
      typename O::Operand x_k[kX];
#pragma GCC unroll 8
      for (int i = 0; i < kX; ++i) x_k[i] = O::load(x + i * x_stride + k);
#pragma GCC unroll 8
      for (int j = 0; j < kW; ++j) {
        const typename O::Operand w = O::load(rows[j] + column + k);
#pragma GCC unroll 8
        for (int i = 0; i < kX; ++i) sums[i][j] = O::multiply_add(x_k[i], w, sums[i][j]);
      }
    } else {
      typename O::Operand w[kW];
#pragma GCC unroll 8
      for (int j = 0; j < kW; ++j) w[j] = O::load(rows[j] + column + k);
#pragma GCC unroll 8
      for (int i = 0; i < kX; ++i) {
        const typename O::Operand x_i = O::load(x + i * x_stride + k);
#pragma GCC unroll 8
        for (int j = 0; j < kW; ++j) sums[i][j] = O::multiply_add(x_i, w[j], sums[i][j]);
      }
    }
  }
  float dots[kX * kW];
  O::template sums<kX * kW>(&sums[0][0], dots);
#pragma GCC unroll 8
  for (int i = 0; i < kX; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kW; ++j) pre[i * kStride + j] += dots[i * kW + j];
  }
}

// sum[i, 0…kTile) += Σⱼ latents[i, j] W[j, 0…kTile) for kX rows of y. columns_of(j) are the rows of W from j on, kPair
// of them, as `columns` makes them. The block's terms are added up before the sum of earlier blocks: one running sum
// would lose more of each, 3 to 30 times as much as PyTorch's product where there are thousands.
template <typename O, int kX, bool kOften, typename ColumnsOf>
inline void decode_tile(const typename O::Copy* latents, const ColumnsOf& columns_of, int count, bool first, float* sum,
                        int64_t sum_stride, Prefetch& next) {
  constexpr int kV = O::kColumnVectors;
  typename O::Vector sums[kX][kV] = {};
  if constexpr (!kOften) next.step();
  for (int j = 0; j < count; j += O::kPair) {
    if constexpr (kOften) next.step();
    const auto& w = columns_of(j);
#pragma GCC unroll 8
    for (int i = 0; i < kX; ++i) {
      const typename O::Operand latent = O::broadcast(latents + i * kStride + j);
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) sums[i][v] = O::multiply_add(latent, w.columns[v], sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kX; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kV; ++v) {
      float* to = sum + i * sum_stride + v * O::kLanes;
      O::store_sum(to, first ? sums[i][v] : O::load_sum(to) + sums[i][v]);
    }
  }
}

// Adds one row of x's latents h[0…count), zeros up to kRows, to the row's statistics and to the latents' own.
template <int kRows>  // a bound that is known: at N 64, d 64 one that is not took half as long again
inline void add_stats(const float* h, int count, float& l1, int64_t& l0, float* total, int64_t* fired) {
  constexpr int kSums = 8;  // side by side, for the compiler to put them in registers
  float sums[kSums] = {};
  int active[kSums] = {};
  static_assert(kRows % kSums == 0);
  for (int j = 0; j < kRows; j += kSums) {
    for (int s = 0; s < kSums; ++s) {
      sums[s] += h[j + s] < 0.0f ? -h[j + s] : h[j + s];
      active[s] += h[j + s] != 0.0f;
    }
  }
  for (int s = 0; s < kSums; ++s) {
    l1 += sums[s];
    l0 += active[s];
  }
  for (int j = 0; j < count; ++j) {
    total[j] += h[j];
    fired[j] += h[j] != 0.0f;
  }
}

// Never inline, one copy for part_of_one and for blocks: within part_of_one, which calls it for every second or fourth
// row of W, it made N 1 up to 7% slower.
__attribute__((noinline)) void activate_latents(Activation activation, float* a, int count) {
  activate(activation, a, count);
}

// What part_in_blocks does, for one row of x, which is bound by reading W and nothing else, kRows rows of W at a time.
// While the dot products of these are summed up, kColumns columns a step, the rows before are multiplied by their
// latents, out of cache, so that W is read without a pause. One row is read after the other, which the caches' own
// prefetcher follows best, and prefetches go kAhead bytes before. Every kSteps steps the core waits for the loads that
// it has begun, which orders prefetches only in that it begins no further ones: without, it seems to run tens of cache
// lines ahead, to ask for all of their prefetches at once, more than it can have under way, and to drop the others (a
// loop of nothing but prefetches ran faster than memory). What was measured is the effect: in bf16 at d 4096 N 1 took a
// quarter longer without waits, and 5% longer with one in 12 steps.
template <typename O, typename T, int kRows, int kSteps>
void part_of_one(const Problem& p, const void* x_copy, const void* zero_row, int64_t begin, int64_t end, float* sum,
                 float* l1, int64_t* l0) {
  using Copy = typename O::Copy;
  using Operand = typename O::Operand;
  using Vector = typename O::Vector;
  constexpr int kTile = O::kColumnVectors * O::kLanes, kSums = 4, kLine = 64;
  constexpr int kLatents = 8;  // kRows of them, for add_stats
  static_assert(kRows % O::kPair == 0 && kRows <= kLatents);
  const auto* x = static_cast<const Copy*>(x_copy);
  const auto* weight = static_cast<const T*>(p.weight);
  const auto* bias = static_cast<const T*>(p.bias_enc);
  const int64_t whole = p.d / kColumns * kColumns, rest = p.d - whole;
  const int64_t row_bytes = p.d * sizeof(T), stride_bytes = p.weight_stride * sizeof(T);
  // whole rows: there may be others' columns between two
  const int64_t ahead = up(kAhead, row_bytes) * stride_bytes, pages_ahead = up(kPagesAhead, row_bytes) * stride_bytes;
  const LatentStats& stats = p.stats;

  struct Rows {
    const T *of[kRows], *tail_of[kRows];
    alignas(kAlignment) T tails[kRows * kColumns];  // the last, incomplete columns, zero-padded
  } blocks[2] = {};
  for (Rows& rows : blocks) {
    for (int j = 0; j < kRows; ++j) {
      rows.of[j] = static_cast<const T*>(zero_row);
      rows.tail_of[j] = rows.tails + j * kColumns;
    }
  }
  alignas(kAlignment) Copy latents[kRows] = {};
  std::memset(sum, 0, sizeof(float) * row_stride(p.d));
  if (stats.wanted()) {
    *l1 = 0.0f;
    *l0 = 0;
  }

  unsigned step = 0;  // from one block to the next: of whole / kColumns * kRows steps each
  int64_t blocks_done = 0;
  for (int64_t row = begin; row < end + kRows; row += kRows, ++blocks_done) {  // one more, for y of the last rows
    Rows& rows = blocks[blocks_done % 2];
    const Rows& before = blocks[1 - blocks_done % 2];
    const int count = static_cast<int>(row >= end ? 0 : end - row < kRows ? end - row : kRows);
    for (int j = 0; j < kRows; ++j) {
      rows.of[j] = j < count ? weight + (row + j) * p.weight_stride : static_cast<const T*>(zero_row);
      if (rest) std::memcpy(rows.tails + j * kColumns, rows.of[j] + whole, rest * sizeof(T));
    }

    Operand latent[kRows / O::kPair];
    const T* decoded[kRows];  // not `before`, which the stores to y might change for all that the compiler knows
    for (int j = 0; j < kRows; j += O::kPair) latent[j / O::kPair] = O::broadcast(latents + j);
    for (int j = 0; j < kRows; ++j) decoded[j] = before.of[j];
    const auto decode = [&](const T* const* from, int64_t column, float* to) {
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; c += kTile) {
        Vector y[O::kColumnVectors];
#pragma GCC unroll 8
        for (int v = 0; v < O::kColumnVectors; ++v) y[v] = O::load_sum(to + c + v * O::kLanes);
#pragma GCC unroll 8
        for (int j = 0; j < kRows; j += O::kPair) {
          Operand columns[O::kColumnVectors];
          O::columns(from + j, column + c, columns);
#pragma GCC unroll 8
          for (int v = 0; v < O::kColumnVectors; ++v) y[v] = O::multiply_add(latent[j / O::kPair], columns[v], y[v]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < O::kColumnVectors; ++v) O::store_sum(to + c + v * O::kLanes, y[v]);
      }
    };

    Vector dots[kRows];
    int64_t column = 0;  // of y, the next
    for (int j = 0; j < kRows; ++j) {
      Vector sums[kSums] = {};
      const auto encode = [&](const T* w, const Copy* x_k) {
#pragma GCC unroll 16
        for (int c = 0; c < kColumns; c += O::kStep) {
          Vector& to = sums[c / O::kStep % kSums];
          to = O::multiply_add(O::load(x_k + c), O::load(w + c), to);
        }
      };
      const T* w = rows.of[j];
      const char* pages = reinterpret_cast<const char*>(w) + pages_ahead;
      for (int64_t page = 0; page < row_bytes; page += kPage) __builtin_prefetch(pages + page, 0, 2);
      for (int64_t k = 0; k < whole; k += kColumns) {
        if (step % kSteps == 0) O::wait();
        const char* next = reinterpret_cast<const char*>(w + k) + ahead;
#pragma GCC unroll 8
        for (unsigned line = 0; line < kColumns * sizeof(T); line += kLine) __builtin_prefetch(next + line, 0, 3);
        encode(w + k, x + k);
        if (++step % kRows == 0) {
          decode(decoded, column, sum + column);
          column += kColumns;
        }
      }
      if (rest) encode(rows.tail_of[j], x + whole);
      dots[j] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    if (rest) decode(before.tail_of, 0, sum + whole);

    alignas(kAlignment) float h[kLatents] = {};
    O::template sums<kRows>(dots, h);
    if (bias != nullptr) {
      for (int j = 0; j < count; ++j) h[j] += widen(bias[row + j]);
    }
    activate_latents(p.activation, h, count);
    for (int j = 0; j < kRows; ++j) latents[j] = j < count ? O::latent(h[j]) : Copy{};
    if (stats.wanted() && count > 0) {
      std::memset(stats.total + row, 0, sizeof(float) * count);
      std::memset(stats.fired + row, 0, sizeof(int64_t) * count);
      for (int j = 0; j < kRows; ++j) h[j] = widen(latents[j]);
      add_stats<kLatents>(h, count, *l1, *l0, stats.total + row, stats.fired + row);
    }
  }
}

template <typename O, typename T>
void part_in_blocks(const Problem& p, const void* x_copy, const void* zero_row, int64_t begin, int64_t end, float* sum,
                    float* l1, int64_t* l0) {
  using Copy = typename O::Copy;
  constexpr int kTile = O::kColumnVectors * O::kLanes;
  static_assert(kColumns % O::kStep == 0 && kColumns % kTile == 0 && kStride >= kBlock + 2 * O::kEncodeW &&
                O::kEncodeW % O::kPair == 0);
  constexpr bool kPacks = O::kPacks && sizeof(T) < sizeof(float);
  struct Columns {
    typename O::Operand columns[O::kColumnVectors];
  };

  const auto* x = static_cast<const Copy*>(x_copy);
  const auto* weight = static_cast<const T*>(p.weight);
  const auto* bias = static_cast<const T*>(p.bias_enc);
  const int64_t whole = p.d / kColumns * kColumns, rest = p.d - whole;
  const int64_t padded = rest ? whole + kColumns : whole, stride = row_stride(p.d);
  int64_t block = kBlockBytes / static_cast<int64_t>(p.d * sizeof(T)) / O::kEncodeW * O::kEncodeW;
  const int64_t most = p.n <= kRowsOfSmallBlock ? kSmallBlock<T> : kBlock;
  block = block > most ? most : block < O::kEncodeW ? O::kEncodeW : block;

  const int64_t encode_x = p.n < O::kEncodeX ? p.n : O::kEncodeX;
  const int64_t panels = up(whole * sizeof(Copy) * encode_x, kPanelBytes);
  const int64_t panel = panels ? up(whole / kColumns, panels) * kColumns : kColumns;
  const bool often = kFewestOfOften <= p.n && p.n <= kMostOfOften;
  int64_t encode_tiles = 0;
  in_tiles<O::kEncodeX>(p.n, [&]<int kX>(int64_t) { encode_tiles += up(block, kEncodeW<O, kX>); });
  const int64_t encode_steps = often ? padded / O::kStep : 0;
  const int64_t decode_steps = often ? up(block, O::kPair) : 1;
  const int64_t steps = encode_steps * encode_tiles + decode_steps * up(p.n, O::kDecodeX) * (padded / kTile);

  const T* rows[kStride];
  const T* tail_rows[kStride];  // the last, incomplete columns, zero-padded to kColumns
  alignas(kAlignment) T tails[kStride * kColumns] = {};
  Columns tile[kPacks ? kBlock / O::kPair : 1];
  alignas(kAlignment) float pre[kStride * kMaxRows];
  alignas(kAlignment) Copy latents[kStride * kMaxRows];
  for (int j = 0; j < kStride; ++j) tail_rows[j] = tails + j * kColumns;

  if (begin == end) std::memset(sum, 0, sizeof(float) * p.n * stride);
  const LatentStats& stats = p.stats;
  if (stats.wanted()) {
    std::memset(l1, 0, sizeof(float) * p.n);
    std::memset(l0, 0, sizeof(int64_t) * p.n);
    std::memset(stats.total + begin, 0, sizeof(float) * (end - begin));
    std::memset(stats.fired + begin, 0, sizeof(int64_t) * (end - begin));
  }
  for (int64_t row = begin; row < end; row += block) {
    const int count = static_cast<int>(end - row < block ? end - row : block);
    for (int j = 0; j < count + 2 * O::kEncodeW; ++j) {  // beyond the block: for the last tile of the encode product
      rows[j] = j < count ? weight + (row + j) * p.weight_stride : static_cast<const T*>(zero_row);
      if (rest) std::memcpy(tails + j * kColumns, rows[j] + whole, rest * sizeof(T));
    }

    const int64_t left = end - row - count;
    Prefetch next(weight + (row + count) * p.weight_stride, p.d * sizeof(T), p.weight_stride * sizeof(T),
                  left < block ? left : block, steps);

    std::memset(pre, 0, sizeof(float) * kStride * p.n);
    for (int64_t k = 0, size = 0; k < padded; k += size) {
      const bool in_tail = k == whole;
      size = in_tail ? kColumns : whole - k < panel ? whole - k : panel;
      in_tiles<O::kEncodeX>(p.n, [&]<int kX>(int64_t i) {
        for (int j = 0; j < count; j += kEncodeW<O, kX>) {
          const auto tile_of = often ? encode_tile<O, kX, true, T> : encode_tile<O, kX, false, T>;
          tile_of(x + i * stride + k, stride, (in_tail ? tail_rows : rows) + j, in_tail ? 0 : k, size,
                  pre + i * kStride + j, next);
        }
      });
    }
    for (int64_t i = 0; i < p.n; ++i) {
      float* a = pre + i * kStride;
      if (bias != nullptr) {
        for (int j = 0; j < count; ++j) a[j] += widen(bias[row + j]);
      }
      activate_latents(p.activation, a, count);
      // the decode product reads latents of the weight's dtype
      for (int j = 0; j < count; ++j) latents[i * kStride + j] = O::latent(a[j]);
      for (int j = count; j < kStride; ++j) latents[i * kStride + j] = Copy{};
      if (stats.wanted()) {
        for (int j = 0; j < kStride; ++j) a[j] = widen(latents[i * kStride + j]);
        const auto add = p.n <= kRowsOfSmallBlock ? add_stats<kSmallBlock<T>> : add_stats<kBlock>;
        add(a, count, l1[i], l0[i], stats.total + row, stats.fired + row);
      }
    }

    for (int64_t k = 0; k < padded; k += kTile) {
      const bool in_tail = k >= whole;
      const auto columns = [&](int j) {
        Columns w;
        O::columns((in_tail ? tail_rows : rows) + j, in_tail ? k - whole : k, w.columns);
        return w;
      };
      const auto decode = [&](const auto& columns_of) {
        in_tiles<O::kDecodeX>(p.n, [&]<int kX>(int64_t i) {
          float* to = sum + i * stride + k;
          if (often) {
            decode_tile<O, kX, true>(latents + i * kStride, columns_of, count, row == begin, to, stride, next);
          } else {
            decode_tile<O, kX, false>(latents + i * kStride, columns_of, count, row == begin, to, stride, next);
          }
        });
      };
      if (kPacks && p.n > O::kDecodeX) {
        for (int j = 0; j < count; j += O::kPair) tile[j / O::kPair] = columns(j);
        decode([&](int j) -> const Columns& { return tile[j / O::kPair]; });
      } else {
        decode(columns);
      }
    }
  }
}

template <typename O, typename T>
void part(const Problem& p, const void* x_copy, const void* zero_row, int64_t begin, int64_t end, float* sum, float* l1,
          int64_t* l0) {
  auto run = part_in_blocks<O, T>;
  if constexpr (O::kLanes == 16) {
    const int64_t row_bytes = p.d * sizeof(T);
    if (p.n == 1 && row_bytes >= kLeastBytesOfOne && p.h * row_bytes >= kLeastWeightOfOne) {
      if constexpr (sizeof(T) < sizeof(float)) {
        if (row_bytes <= kMostBytesOfFour) run = part_of_one<O, T, 4, 8>;
      }
      if (row_bytes <= kMostBytesOfTwo) run = part_of_one<O, T, 2, 12>;
    }
  }
  run(p, x_copy, zero_row, begin, end, sum, l1, l0);
}

}  // namespace
}  // namespace tiedfused::cpu
