// The sparse expert FFN for CPUs, and the other functions of a decode step: matrix-vector products,
// attention of one token, embedding. XLA calls them through its FFI.
//
// With few rows, the time goes into streaming weights from memory: each weight is read once, in the
// order it is stored, and used for all rows that need it. Two inner loops do all the work:
//
//   Dots   out[r][m] = sum_d weights[m][d] x[r][d]      (gate, up; keys)
//   Axpys  y[r][d]  += sum_m h[r][m] weights[m][d]      (down; values; x w)
//
// Work is cut into chunks of neighbouring experts (or rows of a matrix), each with its own sum; the
// sums are added in the order of the chunks, so the same input gives the same bits on as many threads,
// whichever took which chunk. README.md beside this file is the contract.
//
// Letters: B rows  D model width  E experts  M neurons per expert  N layers  K, O inputs and outputs;
// in attention H query heads  K kv heads  G = H/K  C head width  T tokens so far

#include "cpu_common.h"

namespace {

// ---- The two inner loops, over R rows of x and W rows of weights at a time.
//
// One row of x is multiplied with one row of weights after the other, so that memory is read as one
// stream. Where rows of weights are read side by side, the next ones are asked for ahead: a CPU that
// sees several short streams begins each of them late.

template <class T>
inline void Ahead(const T* p) {  // asks for the memory of kStep weights
  for (int64_t i = 0; i < kStep; i += 64 / sizeof(T)) __builtin_prefetch(p + i, 0, 2);
}

// Products of kStep weights with kStep elements of x, `Operand`s, added to sums.
template <class T>
struct Products {
  using Operand = float;  // in the order given by Place
  Pair sums = {};

  static Pair LoadWeights(const T* p) { return LoadPair(p); }
  static Pair LoadOperands(const float* p) { return LoadPair(p); }
  void Add(Pair w, Pair x) { sums.first += w.first * x.first, sums.second += w.second * x.second; }
  Vec Total() const { return sums.first + sums.second; }
};

#ifdef __AVX512BF16__
template <>
struct Products<BFloat16> {  // by one instruction, of x as it is
  using Operand = BFloat16;
  Vec sums = {};

  static Bits LoadWeights(const BFloat16* p) {
    Bits bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
  }
  static Bits LoadOperands(const BFloat16* p) { return LoadWeights(p); }
  void Add(Bits w, Bits x) { sums = (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)w, (__m512bh)x); }
  Vec Total() const { return sums; }
};
#endif

template <class T>
using Operand = typename Products<T>::Operand;

// kSums sums for each product of rows: enough independent ones hide the latency of additions.
template <int R, int W, int kSums, class T>
inline void DotTile(const T* weights, int64_t stride, const Operand<T>* const* x, int64_t width,
                    float* out, int64_t out_stride) {
  Products<T> sums[R][W][kSums] = {};
  const auto add = [&](int64_t d, int k) {
    decltype(Products<T>::LoadWeights(weights)) w[W];
    for (int j = 0; j < W; ++j) w[j] = Products<T>::LoadWeights(weights + j * stride + d);
    if (R == 1 && W == 1) Ahead(weights + d + 1024);
    for (int r = 0; r < R; ++r) {
      const auto v = Products<T>::LoadOperands(x[r] + d);
      for (int j = 0; j < W; ++j) sums[r][j][k].Add(w[j], v);
    }
  };
  int64_t d = 0;
  for (; d + kSums * kStep <= width; d += kSums * kStep)
    for (int k = 0; k < kSums; ++k) add(d + k * kStep, k);
  for (; d + kStep <= width; d += kStep) add(d, 0);
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < W; ++j) {
      Vec all = sums[r][j][0].Total();
      for (int k = 1; k < kSums; ++k) all += sums[r][j][k].Total();
      float total = Sum(all);
      for (int64_t i = d; i < width; ++i) total += Load(x[r] + i) * Load(weights + j * stride + i);
      out[r * out_stride + j] = total;
    }
  }
}

// out[r * out_stride + m] = weights[m] . x[r], for `rows` rows of x and `count` rows of weights,
// `stride` apart.
template <class T>
void Dots(const T* weights, int64_t stride, int64_t count, int64_t width, const Operand<T>* const* x,
          int64_t rows, float* out, int64_t out_stride) {
  int64_t m = 0;
  if (rows >= kTile) {
    for (; m + 4 <= count; m += 4) {
      const T* w = weights + m * stride;
      int64_t r = 0;
      for (; r + kTile <= rows; r += kTile)
        DotTile<kTile, 4, 1>(w, stride, x + r, width, out + r * out_stride + m, out_stride);
      for (; r < rows; ++r)
        DotTile<1, 4, 1>(w, stride, x + r, width, out + r * out_stride + m, out_stride);
    }
  }
  for (; m < count; ++m)
    for (int64_t r = 0; r < rows; ++r)
      DotTile<1, 1, 4>(weights + m * stride, stride, x + r, width, out + r * out_stride + m, out_stride);
}

template <int R, int W, class T>
inline void AxpyTile(const T* weights, int64_t stride, const float* h, int64_t h_stride, int64_t width,
                     float* const* y) {
  int64_t d = 0;
  for (; d + kStep <= width; d += kStep) {
    Pair w[W];
    for (int j = 0; j < W; ++j) {
      w[j] = LoadPair(weights + j * stride + d);
      Ahead(weights + (j + W) * stride + d);
    }
    for (int r = 0; r < R; ++r) {
      Pair sum = LoadPair(y[r] + d);
      for (int j = 0; j < W; ++j) {
        sum.first += h[r * h_stride + j] * w[j].first;
        sum.second += h[r * h_stride + j] * w[j].second;
      }
      StoreVec(y[r] + d, sum.first);
      StoreVec(y[r] + d + kLanes, sum.second);
    }
  }
  if constexpr (std::is_same_v<T, float>) {  // one vector more, if it fits
    for (; d + kLanes <= width; d += kLanes) {
      for (int r = 0; r < R; ++r) {
        Vec sum = LoadVec(y[r] + d);
        for (int j = 0; j < W; ++j) sum += h[r * h_stride + j] * LoadVec(weights + j * stride + d);
        StoreVec(y[r] + d, sum);
      }
    }
  }
  for (; d < width; ++d)
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < W; ++j) y[r][d] += h[r * h_stride + j] * Load(weights + j * stride + d);
}

// y[r] += sum_m h[r * h_stride + m] weights[m], for `rows` rows of y and `count` rows of weights,
// `stride` apart.
template <class T>
void Axpys(const T* weights, int64_t stride, int64_t count, int64_t width, const float* h,
           int64_t h_stride, int64_t rows, float* const* y) {
  int64_t m = 0;
  if (rows == 1)  // registers are free for more weights: the sums are loaded and stored less often
    for (; m + 8 <= count; m += 8) AxpyTile<1, 8>(weights + m * stride, stride, h + m, 0, width, y);
  for (; m + 4 <= count; m += 4) {
    const T* w = weights + m * stride;
    int64_t r = 0;
    for (; r + kTile <= rows; r += kTile)
      AxpyTile<kTile, 4>(w, stride, h + r * h_stride + m, h_stride, width, y + r);
    for (; r < rows; ++r) AxpyTile<1, 4>(w, stride, h + r * h_stride + m, h_stride, width, y + r);
  }
  for (; m < count; ++m)
    for (int64_t r = 0; r < rows; ++r)
      AxpyTile<1, 1>(weights + m * stride, stride, h + r * h_stride + m, h_stride, width, y + r);
}

// More chunks than threads, so that a delayed thread delays the others less.
int64_t NumChunks(const ffi::ThreadPool& pool, int64_t items) {
  return std::max<int64_t>(1, std::min<int64_t>(items, 8 * pool.num_threads()));
}

// Runs work(chunk, sums [B][width]) on every chunk, then adds the sums into out in order. Sums are
// stored in the order of weights of type T.
template <class T, class Out, class Work>
void SumOverChunks(ffi::ThreadPool& pool, int64_t chunks, int64_t batch, int64_t width, Out* out,
                   const Work& work) {
  const int64_t size = batch * width;
  static thread_local std::vector<float> kept;  // fresh memory costs a page fault every 4 KiB
  if (int64_t(kept.size()) < chunks * size) kept.resize(chunks * size);
  float* sums = kept.data();
  ParallelFor(pool, chunks, [&](int64_t chunk) {
    std::fill_n(sums + chunk * size, size, 0.0f);
    work(chunk, sums + chunk * size);
  });
  const int64_t blocks = (size + 4095) / 4096;
  ParallelFor(pool, blocks, [&](int64_t block) {
    const int64_t begin = block * 4096, end = std::min(size, begin + 4096);
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t i = begin; i < end; ++i) sums[i] += sums[chunk * size + i];
  });
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < width; ++i)
      Store(out + b * width + i, sums[b * width + Place(static_cast<const T*>(nullptr), i, width)]);
}

// ---- Weights of 8, 6 and 4 bits, in the tiles of quantized.py: 16 outputs by 32 inputs.
//
// x is rounded to signed bytes as well, in groups of 32 with a scale each, and products are summed as
// integers: in every group of a tile exactly, so all instruction sets give the same bits. Codes are
// unsigned, as the instruction for dot products of bytes wants them; zero times the sum of x's bytes,
// the same for all outputs, is taken off beforehand.

constexpr int kOutputs = 16, kGroup = 32;
typedef float Floats16 __attribute__((vector_size(64)));
typedef int32_t Ints16 __attribute__((vector_size(64)));
typedef uint32_t Bits16 __attribute__((vector_size(64)));
typedef uint16_t Shorts16 __attribute__((vector_size(32)));

struct Scaled {  // codes and bfloat16 scales of a matrix, or of the part at hand
  const uint8_t* codes;
  const uint16_t* scales;
  int64_t bits;

  Scaled From(int64_t tile) const {
    return {codes + tile * 64 * bits, scales + tile * kOutputs, bits};
  }
};

// sums + the dot products of 4 codes of each of 16 outputs with 4 signed bytes of x
inline Ints16 AddDots(Ints16 sums, Bits16 codes, int32_t x) {
#ifdef __AVX512VNNI__
  return (Ints16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(x));
#else
  for (int j = 0; j < 4; ++j) sums += (Ints16)(codes >> (8 * j) & 255) * int32_t(int8_t(x >> (8 * j)));
  return sums;
#endif
}

// Rows of x, rounded.
struct Rounded {
  int64_t rows, groups;
  std::vector<int32_t> words;  // [rows][8 groups], 4 bytes each
  std::vector<float> scales;   // [rows][groups]
  std::vector<int32_t> sums;   // of the bytes of a group

  Rounded(int64_t rows, int64_t width)
      : rows(rows), groups(width / kGroup), words(rows * groups * 8), scales(rows * groups),
        sums(rows * groups) {}

  // What is not finite has no byte: the group's scale then is none, either, and so are its products.
  void Set(int64_t row, const float* x) {
    for (int64_t g = row * groups; g < (row + 1) * groups; ++g, x += kGroup) {
      float most = 0, none = 0;
      for (int i = 0; i < kGroup; ++i) most = std::max(most, std::fabs(x[i])), none += x[i] * 0;
      const float steps = most > 1e-30f && none == 0 ? 127 / most : 0;
      int8_t bytes[kGroup] = {};
      sums[g] = 0;
      for (int i = 0; i < kGroup && steps > 0; ++i)
        sums[g] += bytes[i] = int8_t(std::nearbyint(x[i] * steps));
      std::memcpy(words.data() + g * 8, bytes, kGroup);
      scales[g] = most / 127 + none;
    }
  }
};

// sums[t][r] += the products of W tile rows, each 16 outputs by all inputs, with R rows of x. With one
// row, when the time goes into reading, codes are asked for ahead, also those of the next tile row.
template <int kBits, int R, int W>
inline void AddTiles(Scaled w, const Rounded& x, const int64_t* rows, Floats16 (*sums)[R]) {
  constexpr int kSums = R == 1 ? 2 : 1;  // hides the latency of additions
  const int32_t *words[R], *totals[R];
  const float* scales[R];
  for (int r = 0; r < R; ++r) {
    words[r] = x.words.data() + rows[r] * x.groups * 8;
    totals[r] = x.sums.data() + rows[r] * x.groups;
    scales[r] = x.scales.data() + rows[r] * x.groups;
  }
  constexpr int kLoads = kBits == 8 ? 8 : 4;  // of 6 bits, those of the lower 4
  constexpr int kAhead = kBits == 8 ? 1024 : kBits == 6 ? 22 * 384 : 4096;
  for (int64_t g = 0; g < x.groups; ++g) {
    Ints16 dots[W][R][kSums] = {};
    for (int t = 0; t < W; ++t)
      for (int r = 0; r < R; ++r) dots[t][r][0] -= totals[r][g] * (1 << (kBits - 1));
    Bits16 upper[W][2] = {};
    if constexpr (kBits == 6)
      for (int t = 0; t < W; ++t) {
        const uint8_t* from = w.codes + ((t * x.groups + g) * kBits + 4) * 64;
        std::memcpy(upper[t], from, sizeof upper[t]);
        if (R == 1) __builtin_prefetch(from + kAhead, 0, 2), __builtin_prefetch(from + kAhead + 64, 0, 2);
      }
    for (int s = 0; s < kLoads; ++s) {
      for (int t = 0; t < W; ++t) {
        const uint8_t* from = w.codes + ((t * x.groups + g) * kBits + s) * 64;
        Bits16 codes;
        std::memcpy(&codes, from, sizeof codes);
        if (R == 1) __builtin_prefetch(from + kAhead, 0, 2);
        for (int r = 0; r < R; ++r) {
          Ints16 &even = dots[t][r][0], &odd = dots[t][r][kSums - 1];
          if constexpr (kBits == 8) {
            (s % 2 ? odd : even) = AddDots(s % 2 ? odd : even, codes, words[r][g * 8 + s]);
          } else {
            Bits16 low = codes & 0x0f0f0f0fu, high = codes >> 4 & 0x0f0f0f0fu;
            if constexpr (kBits == 6) {
              const Bits16 more = upper[t][s % 2] >> (s & 2);  // s / 2 pairs of bits
              low |= (more & 0x03030303u) << 4, high |= more & 0x30303030u;
            }
            even = AddDots(even, low, words[r][g * 8 + s]);
            odd = AddDots(odd, high, words[r][g * 8 + s + 4]);
          }
        }
      }
    }
    for (int t = 0; t < W; ++t) {
      Shorts16 halves;
      std::memcpy(&halves, w.scales + (t * x.groups + g) * kOutputs, sizeof halves);
      const Floats16 scale = (Floats16)(__builtin_convertvector(halves, Bits16) << 16);
      for (int r = 0; r < R; ++r) {
        if (kSums == 2) dots[t][r][0] += dots[t][r][kSums - 1];
        sums[t][r] += __builtin_convertvector(dots[t][r][0], Floats16) * (scale * scales[r][g]);
      }
    }
  }
}

template <int kBits>
void AddProductsOf(Scaled w, const Rounded& x, const std::vector<int64_t>& rows, int64_t outputs,
                   float* const* out) {
  const int64_t count = rows.size();
  const auto some = [&](auto number, auto tiles, int64_t r, int64_t o) {
    constexpr int R = number.value, W = tiles.value;
    Floats16 sums[W][R] = {};
    const auto move = [&](auto copy) {  // of a size that is known, if all are there
      const int64_t left = outputs - o;
      for (int t = 0; t < W; ++t)
        for (int i = 0; i < R; ++i) {
          float* at = out[r + i] + o + t * kOutputs;
          if (left >= W * kOutputs)
            copy(at, &sums[t][i], sizeof(Floats16));
          else
            copy(at, &sums[t][i], std::min<int64_t>(kOutputs, left - t * kOutputs) * sizeof(float));
        }
    };
    move([](float* at, Floats16* sum, size_t bytes) { std::memcpy(sum, at, bytes); });
    AddTiles<kBits, R, W>(w.From(o / kOutputs * x.groups), x, rows.data() + r, sums);
    move([](float* at, Floats16* sum, size_t bytes) { std::memcpy(at, sum, bytes); });
  };
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  const std::integral_constant<int, 4> four;
  for (int64_t o = 0; o < outputs; o += 2 * kOutputs) {
    const bool both = o + kOutputs < outputs;
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) both ? some(four, two, r, o) : some(four, one, r, o);
    for (; r < count; ++r) {  // one tile row after the other, as they are stored
      some(one, one, r, o);
      if (both) some(one, one, r, o + kOutputs);
    }
  }
}

// out[r][o] += sum over inputs of w[o] x[rows[r]], for the first so many outputs o of w.
void AddProducts(Scaled w, const Rounded& x, const std::vector<int64_t>& rows, int64_t outputs,
                 float* const* out) {
  const auto add = w.bits == 8 ? AddProductsOf<8> : w.bits == 6 ? AddProductsOf<6> : AddProductsOf<4>;
  add(w, x, rows, outputs, out);
}

// ---- Many rows of bfloat16, as those of a prompt: the time goes into products, not into reading.
//
// Weights are copied into panels of 32 outputs, of which every row of x then makes use. A word of a
// panel has two neighbouring inputs of an output, which one instruction multiplies with two of x.

constexpr int64_t kMany = 8;  // rows from which this is faster

#ifdef __AVX512BF16__
constexpr bool kHasPanels = true;
#else
constexpr bool kHasPanels = false;
#endif
constexpr int kPanel = 32;

// panel[p][o]: inputs 2p and 2p + 1 of output o; weights [outputs][inputs], `stride` apart.
void PackOutputs(const BFloat16* weights, int64_t stride, int64_t outputs, int64_t pairs,
                 uint32_t* panel) {
  if (outputs < kPanel) std::fill_n(panel, pairs * kPanel, 0u);
  for (int64_t begin = 0; begin < pairs; begin += 16) {  // stays in the nearest cache
    const int64_t end = std::min(pairs, begin + 16);
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t p = begin; p < end; ++p)
        std::memcpy(panel + p * kPanel + o, weights + o * stride + 2 * p, sizeof *panel);
  }
}

// The same of weights [inputs][outputs], and of so many panels that hold all outputs.
void PackInputs(const BFloat16* weights, int64_t stride, int64_t outputs, int64_t pairs,
                uint32_t* panels) {
  for (int64_t p = 0; p < pairs; ++p) {
    const BFloat16 *even = weights + 2 * p * stride, *odd = even + stride;
    for (int64_t o = 0; o < outputs; o += kPanel) {
      uint32_t* panel = panels + o * pairs + p * kPanel;
      __builtin_prefetch(even + 16 * stride + o);
      __builtin_prefetch(odd + 16 * stride + o);
      if (outputs - o >= kPanel) {
        for (int64_t i = 0; i < kPanel; ++i)
          panel[i] = uint32_t(odd[o + i].bits) << 16 | even[o + i].bits;
      } else {
        for (int64_t i = 0; i < kPanel; ++i)
          panel[i] = o + i < outputs ? uint32_t(odd[o + i].bits) << 16 | even[o + i].bits : 0;
      }
    }
  }
}

// Inputs that are multiplied before sums are stored: `parts` of so many pairs of bfloat16; those of a
// row of x are `apart`, those of the panels of a part lie behind those of the last one.
struct Inputs {
  int64_t pairs, parts = 1, apart = 0;
};

// y[r][o..o + 32) += the products of a panel with R rows of x; panels of parts are `next` words apart.
template <int R>
inline void AddPanelTile(const uint32_t* panel, int64_t next, Inputs inputs, const BFloat16* const* x,
                         float* const* y, int64_t o) {
#ifdef __AVX512BF16__
  __m512 low[R], high[R];
  for (int r = 0; r < R; ++r)
    low[r] = _mm512_loadu_ps(y[r] + o), high[r] = _mm512_loadu_ps(y[r] + o + 16);
  for (int64_t part = 0; part < inputs.parts; ++part, panel += next) {
    for (int64_t p = 0; p < inputs.pairs; ++p) {
      const __m512bh first = (__m512bh)_mm512_loadu_si512(panel + p * kPanel);
      const __m512bh second = (__m512bh)_mm512_loadu_si512(panel + p * kPanel + 16);
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, x[r] + part * inputs.apart + 2 * p, sizeof pair);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        low[r] = _mm512_dpbf16_ps(low[r], first, both);
        high[r] = _mm512_dpbf16_ps(high[r], second, both);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    _mm512_storeu_ps(y[r] + o, low[r]), _mm512_storeu_ps(y[r] + o + 16, high[r]);
#endif
}

// The same of `count` neighbouring panels, from output 0 on, and all rows.
void AddPanels(const uint32_t* panels, int64_t count, Inputs inputs,
               const std::vector<const BFloat16*>& x, const std::vector<float*>& y) {
  const int64_t rows = x.size(), words = inputs.pairs * kPanel;
  const auto some = [&](auto number, int64_t r) {
    for (int64_t i = 0; i < count; ++i)
      AddPanelTile<number.value>(panels + i * words, count * words, inputs, x.data() + r, y.data() + r,
                                 i * kPanel);
  };
  int64_t r = 0;
  for (; r + 12 <= rows; r += 12) some(std::integral_constant<int, 12>(), r);
  for (; r + 4 <= rows; r += 4) some(std::integral_constant<int, 4>(), r);
  for (; r < rows; ++r) some(std::integral_constant<int, 1>(), r);
}

// Rows of x, one cache line further apart than they are long: of rows whose distance is a power of two
// all would share the same few lines of a cache.
struct Apart {
  int64_t stride;
  std::vector<BFloat16> held;

  Apart(const BFloat16* x, int64_t rows, int64_t width) : stride(width + 32), held(rows * stride) {
    for (int64_t r = 0; r < rows; ++r) std::copy_n(x + r * width, width, held.data() + r * stride);
  }
  const BFloat16* operator[](int64_t row) const { return held.data() + row * stride; }
};

// ---- The sparse FFN.

enum Activation { kSilu, kGelu, kGeluTanh, kRelu };  // in the order of reference.ACTIVATIONS

inline Vec Activate(Activation activation, Vec z) {
  switch (activation) {
    case kSilu:
      return z / (1 + Exp(-z));
    case kGelu:
      for (int i = 0; i < kLanes; ++i) z[i] = 0.5f * z[i] * (1 + std::erf(z[i] * 0.70710678f));
      return z;
    case kGeluTanh:  // z (1 + tanh(u)) / 2
      return z / (1 + Exp(-1.59576912f * (z + 0.044715f * z * z * z)));
    default:
      return z < 0 ? Vec{} : z;
  }
}

template <class T>
struct Weights {
  const T *gate, *up, *down, *gate_bias, *up_bias;  // null if the model has none
};

// up[r] = act(gate[r]) * up[r], or act(up[r]) where gate is null, after their biases if there are any;
// rows of M are `stride` apart.
template <class T>
void Activations(Activation activation, int64_t rows, int64_t M, const T* up_bias, const T* gate_bias,
                 const float* gate, float* up, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t m = 0; m < M; m += kLanes) {
      float* to = up + r * stride + m;
      Vec h = LoadSome(to, M - m);
      if (up_bias) h += LoadSome(up_bias + m, M - m);
      if (gate) {
        Vec z = LoadSome(gate + r * stride + m, M - m);
        if (gate_bias) z += LoadSome(gate_bias + m, M - m);
        h *= Activate(activation, z);
      } else {
        h = Activate(activation, h);
      }
      StoreSome(to, h, M - m);
    }
  }
}

// y[b] += down^T act(gate x[b]) * (up x[b]) for one expert and the rows that use it.
template <class T>
void AddExpert(const Weights<T>& w, Activation activation, int64_t M, int64_t D,
               const std::vector<const Operand<T>*>& x, const std::vector<float*>& y,
               std::vector<float>& scratch) {
  const int64_t rows = x.size();
  scratch.resize(2 * rows * M);
  float *h = scratch.data(), *gate = h + rows * M;
  Dots(w.up, D, M, D, x.data(), rows, h, M);
  if (w.gate) Dots(w.gate, D, M, D, x.data(), rows, gate, M);
  Activations(activation, rows, M, w.up_bias, w.gate_bias, w.gate ? gate : nullptr, h, M);
  Axpys(w.down, D, M, D, h, M, rows, y.data());
}

// An expert with weights of 8, 6 or 4 bits.
struct ScaledExpert {
  Scaled gate, up, down;             // gate.codes null: there is none
  const float *up_bias, *gate_bias;  // null if the model has none
  Activation activation;
  int64_t M, D;

  // Hidden activations for rows of x, rounded, into places of `h` from `first` on.
  void Hidden(const Rounded& x, const std::vector<int64_t>& rows, std::vector<float>& scratch,
              Rounded& h, int64_t first) const {
    const int64_t count = rows.size();
    scratch.assign(2 * count * M, 0.0f);
    std::vector<float*> to(count);
    const auto project = [&](Scaled w, float* out) {
      for (int64_t r = 0; r < count; ++r) to[r] = out + r * M;
      AddProducts(w, x, rows, M, to.data());
    };
    float *made = scratch.data(), *gated = gate.codes ? made + count * M : nullptr;
    project(up, made);
    if (gated) project(gate, gated);
    Activations(activation, count, M, up_bias, gate_bias, gated, made, M);
    for (int64_t r = 0; r < count; ++r) h.Set(first + r, made + r * M);
  }

  // y[i][0] and on += what the activations in places from `first` on give, of outputs from `begin`,
  // a multiple of 16, to `end`.
  void Down(const Rounded& h, int64_t first, int64_t begin, int64_t end,
            const std::vector<float*>& y) const {
    std::vector<int64_t> places(y.size());
    for (size_t r = 0; r < y.size(); ++r) places[r] = first + r;
    AddProducts(down.From(begin / kOutputs * h.groups), h, places, end - begin, y.data());
  }
};

// The rows of x as floats: in their order, or in that of weights of type T.
template <class T>
std::vector<float> ToFloat(const T* x, int64_t rows, int64_t width, bool placed) {
  std::vector<float> made(rows * width);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width; ++i)
      made[r * width + (placed ? Place(x, i, width) : i)] = Load(x + r * width + i);
  return made;
}

// The rows of x as Dots wants them for weights of type T.
template <class T>
struct OperandRows {
  std::vector<float> made;
  std::vector<const Operand<T>*> rows;

  OperandRows(const T* x, int64_t count, int64_t width) {
    const Operand<T>* first;
    if constexpr (std::is_same_v<T, Operand<T>>) {
      first = x;
    } else {
      made = ToFloat(x, count, width, true);
      first = made.data();
    }
    for (int64_t r = 0; r < count; ++r) rows.push_back(first + r * width);
  }
};

// out[b] = the sum over the experts of row b of what add(expert, rows, y, scratch) adds to y[i], for
// the rows that use the expert; sums are stored in the order of weights of type T.
template <class T, class Out, class Add>
void SumExperts(ffi::ThreadPool& pool, const bool* active, Out* out, int64_t B, int64_t D, int64_t E,
                const Add& add) {
  std::vector<int64_t> used;  // by any row
  for (int64_t e = 0; e < E; ++e)
    for (int64_t b = 0; b < B; ++b)
      if (active[b * E + e]) {
        used.push_back(e);
        break;
      }
  const int64_t count = used.size(), chunks = NumChunks(pool, count);
  SumOverChunks<T>(pool, chunks, B, D, out, [&](int64_t chunk, float* y_BD) {
    std::vector<int64_t> rows;
    std::vector<float*> to;
    std::vector<float> scratch;
    for (int64_t k = count * chunk / chunks; k < count * (chunk + 1) / chunks; ++k) {
      const int64_t e = used[k];
      rows.clear(), to.clear();
      for (int64_t b = 0; b < B; ++b) {
        if (!active[b * E + e]) continue;
        rows.push_back(b);
        to.push_back(y_BD + b * D);
      }
      add(e, rows, to, scratch);
    }
  });
}

// The same for many rows, in two steps: hidden(expert, rows, first) makes the hidden activations of
// an expert for its rows and keeps them in places from `first` on; down(experts, number, first, begin,
// end, y) adds what those of so many experts give, of outputs from `begin` to `end`, to y[i][0] and
// on, for each of the rows. These experts are of all rows, or one alone; the places of one lie behind
// those of the last. `start(places)` is called before. Each output is summed in the order of experts.
template <class Out, class Start, class Hidden, class Down>
void SumExpertsOfMany(ffi::ThreadPool& pool, const bool* active, Out* out, int64_t B, int64_t D,
                      int64_t E, const Start& start, const Hidden& hidden, const Down& down) {
  constexpr int64_t kBlock = 256;  // outputs: those of all rows stay in the second cache
  constexpr size_t kTogether = 8;  // experts: sums are loaded and stored once for them
  std::vector<std::vector<int64_t>> rows(E);
  std::vector<int64_t> first(E), used;
  int64_t places = 0;
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t b = 0; b < B; ++b)
      if (active[b * E + e]) rows[e].push_back(b);
    first[e] = places;
    places += rows[e].size();
    if (!rows[e].empty()) used.push_back(e);
  }
  start(places);
  ParallelFor(pool, used.size(), [&](int64_t k) { hidden(used[k], rows[used[k]], first[used[k]]); });
  const int64_t blocks = (D + kBlock - 1) / kBlock;
  static thread_local std::vector<float> kept;
  if (int64_t(kept.size()) < blocks * B * kBlock) kept.resize(blocks * B * kBlock);
  float* sums = kept.data();  // [blocks][B][kBlock]: rows D apart would share few lines of a cache
  ParallelFor(pool, blocks, [&](int64_t block) {
    const int64_t begin = block * kBlock, end = std::min(D, begin + kBlock);
    float* y = sums + block * B * kBlock;
    std::fill_n(y, B * kBlock, 0.0f);
    std::vector<float*> to;
    const auto of_all = [&](size_t k) { return int64_t(rows[used[k]].size()) == B; };
    for (size_t k = 0, next; k < used.size(); k = next) {
      for (next = k + 1; of_all(k) && next < used.size() && next < k + kTogether && of_all(next);) ++next;
      to.clear();
      for (const int64_t b : rows[used[k]]) to.push_back(y + b * kBlock);
      down(used.data() + k, next - k, first[used[k]], begin, end, to);
    }
    for (int64_t b = 0; b < B; ++b)
      for (int64_t d = begin; d < end; ++d) Store(out + b * D + d, y[b * kBlock + d - begin]);
  });
}

// The sparse FFN in bfloat16 for many rows.
void FfnOfMany(ffi::ThreadPool& pool, const BFloat16* x, const bool* active,
               const Weights<BFloat16>& w, BFloat16* out, Activation activation, int64_t B, int64_t D,
               int64_t E, int64_t M) {
  std::vector<BFloat16> h;  // [places][M]
  const Apart x_BD(x, B, D);
  const auto hidden = [&](int64_t e, const std::vector<int64_t>& rows, int64_t first) {
    static thread_local std::vector<uint32_t> panel;
    static thread_local std::vector<float> sums;
    const int64_t count = rows.size();
    panel.resize(D / 2 * kPanel);
    std::vector<const BFloat16*> from;
    std::vector<float*> to(count);
    for (const int64_t b : rows) from.push_back(x_BD[b]);
    for (int64_t m = 0; m < M; m += kPanel) {
      const int64_t neurons = std::min<int64_t>(kPanel, M - m);
      sums.assign(2 * count * kPanel, 0.0f);
      float *up = sums.data(), *gate = up + count * kPanel;
      const auto project = [&](const BFloat16* weights, float* to_RM) {
        PackOutputs(weights + (e * M + m) * D, D, neurons, D / 2, panel.data());
        for (int64_t r = 0; r < count; ++r) to[r] = to_RM + r * kPanel;
        AddPanels(panel.data(), 1, {D / 2}, from, to);
      };
      project(w.up, up);
      if (w.gate) project(w.gate, gate);
      const auto bias = [&](const BFloat16* p) { return p ? p + e * M + m : nullptr; };
      Activations(activation, count, neurons, bias(w.up_bias), bias(w.gate_bias),
                  w.gate ? gate : nullptr, up, kPanel);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t i = 0; i < neurons; ++i) Store(&h[(first + r) * M + m + i], up[r * kPanel + i]);
    }
  };
  const auto down = [&](const int64_t* experts, int64_t number, int64_t first, int64_t begin,
                        int64_t end, const std::vector<float*>& rows) {
    static thread_local std::vector<uint32_t> panels;
    const int64_t count = (end - begin + kPanel - 1) / kPanel, words = M / 2 * kPanel;
    panels.resize(number * count * words);
    for (int64_t k = 0; k < number; ++k)
      PackInputs(w.down + experts[k] * M * D + begin, D, end - begin, M / 2,
                 panels.data() + k * count * words);
    std::vector<const BFloat16*> from;
    const int64_t places = rows.size();
    for (int64_t r = 0; r < places; ++r) from.push_back(h.data() + (first + r) * M);
    AddPanels(panels.data(), count, {M / 2, number, places * M}, from, rows);
  };
  SumExpertsOfMany(pool, active, out, B, D, E, [&](int64_t places) { h.resize(places * M); }, hidden,
                   down);
}

// The operands of an FFN after x, active and layer, of which those of `layer` are taken in order.
struct Operands {
  const ffi::RemainingArgs& rest;
  int64_t layer;
  size_t next = 0;

  template <class T>
  const T* Take(bool exists = true) {
    if (!exists) return nullptr;
    const auto buffer = rest.get<ffi::AnyBuffer>(next++);
    const int64_t N = buffer->dimensions()[0];
    const int64_t n = std::min(std::max<int64_t>(layer, 0), N - 1);  // as XLA's own dynamic slices
    const int64_t bytes = buffer->size_bytes() / std::max<int64_t>(N, 1);
    return reinterpret_cast<const T*>(static_cast<const char*>(buffer->untyped_data()) + n * bytes);
  }
  Scaled TakeScaled(int64_t bits, bool exists = true) {
    const auto* codes = Take<uint8_t>(exists);
    return {codes, Take<uint16_t>(exists), bits};
  }
};

// In order: up, down, then gate, up_bias and gate_bias if present.
template <class T>
ffi::Error RunFfn(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& active,
                  int64_t layer, const ffi::RemainingArgs& rest, ffi::Result<ffi::AnyBuffer> y,
                  int64_t activation, bool has_gate, bool has_up_bias, bool has_gate_bias) {
  const int64_t B = x.dimensions()[0], D = x.dimensions()[1], E = active.dimensions()[1];
  const int64_t M = rest.get<ffi::AnyBuffer>(0)->dimensions()[2];
  Operands operands = {rest, layer};
  Weights<T> w = {};
  w.up = operands.Take<T>();
  w.down = operands.Take<T>();
  w.gate = operands.Take<T>(has_gate);
  w.up_bias = operands.Take<T>(has_up_bias);
  w.gate_bias = operands.Take<T>(has_gate_bias);
  if constexpr (kHasPanels && std::is_same_v<T, BFloat16>) {
    if (B >= kMany && D % 2 == 0 && M % 2 == 0) {
      FfnOfMany(pool, static_cast<const T*>(x.untyped_data()),
                static_cast<const bool*>(active.untyped_data()), w,
                static_cast<T*>(y->untyped_data()), Activation(activation), B, D, E, M);
      return ffi::Error::Success();
    }
  }
  const OperandRows<T> x_BD(static_cast<const T*>(x.untyped_data()), B, D);
  SumExperts<T>(pool, static_cast<const bool*>(active.untyped_data()),
                static_cast<T*>(y->untyped_data()), B, D, E,
                [&](int64_t e, const std::vector<int64_t>& rows, const std::vector<float*>& to,
                    std::vector<float>& scratch) {
                  std::vector<const Operand<T>*> from;
                  for (const int64_t b : rows) from.push_back(x_BD.rows[b]);
                  const auto matrix = [&](const T* p) { return p ? p + e * M * D : nullptr; };
                  const auto vector = [&](const T* p) { return p ? p + e * M : nullptr; };
                  const Weights<T> expert = {matrix(w.gate), matrix(w.up), matrix(w.down),
                                             vector(w.gate_bias), vector(w.up_bias)};
                  AddExpert(expert, Activation(activation), M, D, from, to, scratch);
                });
  return ffi::Error::Success();
}

ffi::Error Ffn(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer active,
               ffi::Buffer<ffi::S32> layer, ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y,
               int64_t activation, bool has_gate, bool has_up_bias, bool has_gate_bias) {
  const int64_t index = layer.typed_data()[0];
  if (x.element_type() == ffi::F32)
    return RunFfn<float>(pool, x, active, index, rest, y, activation, has_gate, has_up_bias,
                         has_gate_bias);
  return RunFfn<BFloat16>(pool, x, active, index, rest, y, activation, has_gate, has_up_bias,
                          has_gate_bias);
}

// Arrays of x's type as floats, [rows][width].
std::vector<float> ToFloat(bool is_float, const void* data, int64_t rows, int64_t width) {
  return is_float ? ToFloat(static_cast<const float*>(data), rows, width, false)
                  : ToFloat(static_cast<const BFloat16*>(data), rows, width, false);
}

// Rows of x, rounded to bytes.
Rounded ToRounded(const ffi::AnyBuffer& x) {
  const int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  const std::vector<float> floats = ToFloat(x.element_type() == ffi::F32, x.untyped_data(), rows, width);
  Rounded made(rows, width);
  for (int64_t r = 0; r < rows; ++r) made.Set(r, floats.data() + r * width);
  return made;
}

// Operands after layer, in order: codes and scales of up and down, of gate if present, then up_bias
// and gate_bias if present. Codes are [N, E, M/16, D/32, ...] and, of down, [N, E, D/16, M/32, ...].
ffi::Error ScaledFfn(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer active,
                     ffi::Buffer<ffi::S32> layer, ffi::RemainingArgs rest,
                     ffi::Result<ffi::AnyBuffer> y, int64_t activation, bool has_gate,
                     bool has_up_bias, bool has_gate_bias, int64_t bits, int64_t neurons) {
  using Rows = std::vector<int64_t>;
  using Sums = std::vector<float*>;
  const bool is_float = x.element_type() == ffi::F32;
  const int64_t B = x.dimensions()[0], D = x.dimensions()[1], E = active.dimensions()[1], M = neurons;
  Operands operands = {rest, layer.typed_data()[0]};
  const Scaled up = operands.TakeScaled(bits), down = operands.TakeScaled(bits);
  const Scaled gate = operands.TakeScaled(bits, has_gate);
  const auto biases = [&](bool exist) {
    return exist ? ToFloat(is_float, operands.Take<char>(), E, M) : std::vector<float>();
  };
  const std::vector<float> up_bias = biases(has_up_bias), gate_bias = biases(has_gate_bias);
  const Rounded x_BD = ToRounded(x);
  const auto expert = [&](int64_t e) {
    // Of an expert's matrix of O outputs and K inputs.
    const auto at = [e](Scaled w, int64_t O, int64_t K) {
      return w.codes ? w.From(e * ((O + kOutputs - 1) / kOutputs) * (K / kGroup)) : w;
    };
    const auto bias = [&](const std::vector<float>& b) { return b.empty() ? nullptr : b.data() + e * M; };
    return ScaledExpert{at(gate, M, D), at(up, M, D), at(down, D, M), bias(up_bias), bias(gate_bias),
                        Activation(activation), M, D};
  };
  const bool* used = static_cast<const bool*>(active.untyped_data());
  std::vector<float> floats(is_float ? 0 : B * D);
  float* out = is_float ? static_cast<float*>(y->untyped_data()) : floats.data();
  if (B < kMany) {
    SumExperts<float>(pool, used, out, B, D, E,
                      [&](int64_t e, const Rows& rows, const Sums& to, std::vector<float>& scratch) {
                        Rounded h(rows.size(), M);
                        expert(e).Hidden(x_BD, rows, scratch, h, 0);
                        expert(e).Down(h, 0, 0, D, to);
                      });
  } else {
    std::unique_ptr<Rounded> h;
    SumExpertsOfMany(
        pool, used, out, B, D, E, [&](int64_t places) { h = std::make_unique<Rounded>(places, M); },
        [&](int64_t e, const Rows& rows, int64_t first) {
          static thread_local std::vector<float> scratch;
          expert(e).Hidden(x_BD, rows, scratch, *h, first);
        },
        [&](const int64_t* experts, int64_t number, int64_t first, int64_t begin, int64_t end,
            const Sums& to) {
          for (int64_t k = 0; k < number; ++k)
            expert(experts[k]).Down(*h, first + k * to.size(), begin, end, to);
        });
  }
  for (size_t i = 0; i < floats.size(); ++i)
    Store(static_cast<BFloat16*>(y->untyped_data()) + i, floats[i]);
  return ffi::Error::Success();
}

// ---- Matrix-vector products.

// Several panels at a time, and their inputs in parts: of weights [inputs][outputs] whole lines of the
// cache are read side by side, and what is packed stays in the second cache.
void LinearOfMany(ffi::ThreadPool& pool, const BFloat16* x, const BFloat16* weights, float* out,
                  int64_t B, int64_t K, int64_t O, bool transposed) {
  constexpr int64_t kInputs = 1024;
  const Apart x_BK(x, B, K);
  const int64_t panels = (O + kPanel - 1) / kPanel;
  const int64_t width = std::min<int64_t>(4, std::max<int64_t>(1, panels / (4 * pool.num_threads())));
  ParallelFor(pool, (panels + width - 1) / width, [&](int64_t block) {
    static thread_local std::vector<uint32_t> packed;
    static thread_local std::vector<float> sums;
    const int64_t begin = block * width * kPanel, end = std::min(O, begin + width * kPanel);
    const int64_t count = (end - begin + kPanel - 1) / kPanel;
    packed.resize(count * kInputs / 2 * kPanel);
    sums.assign(B * count * kPanel, 0.0f);
    std::vector<const BFloat16*> from(B);
    std::vector<float*> to;
    for (int64_t b = 0; b < B; ++b) to.push_back(sums.data() + b * count * kPanel);
    for (int64_t k = 0; k < K; k += kInputs) {
      const int64_t pairs = std::min(kInputs, K - k) / 2;
      if (!transposed) PackInputs(weights + k * O + begin, O, end - begin, pairs, packed.data());
      for (int64_t o = begin; transposed && o < end; o += kPanel)
        PackOutputs(weights + o * K + k, K, std::min<int64_t>(kPanel, end - o), pairs,
                    packed.data() + (o - begin) * pairs);
      for (int64_t b = 0; b < B; ++b) from[b] = x_BK[b] + k;
      AddPanels(packed.data(), count, {pairs}, from, to);
    }
    for (int64_t b = 0; b < B; ++b) std::copy_n(to[b], end - begin, out + b * O + begin);
  });
}

// y [B, O] = x [B, K] w[layer], w [N, K, O]; or, transposed, w [N, O, K].
template <class T>
ffi::Error RunLinear(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, int64_t layer,
                     const ffi::AnyBuffer& w, ffi::Result<ffi::Buffer<ffi::F32>> y, bool transposed) {
  const int64_t B = x.dimensions()[0], K = x.dimensions()[1], O = y->dimensions()[1];
  layer = std::min(std::max<int64_t>(layer, 0), int64_t(w.dimensions()[0]) - 1);
  const T* weights = static_cast<const T*>(w.untyped_data()) + layer * K * O;
  float* out = y->typed_data();
  if constexpr (kHasPanels && std::is_same_v<T, BFloat16>) {
    if (B >= kMany && K % 2 == 0) {
      LinearOfMany(pool, static_cast<const T*>(x.untyped_data()), weights, out, B, K, O, transposed);
      return ffi::Error::Success();
    }
  }
  const T* values = static_cast<const T*>(x.untyped_data());
  const int64_t items = transposed ? O : K, chunks = NumChunks(pool, items / 8);
  const auto begin = [&](int64_t chunk) { return items / 8 * chunk / chunks * 8; };
  const auto end = [&](int64_t chunk) { return chunk + 1 == chunks ? items : begin(chunk + 1); };
  if (transposed) {
    const OperandRows<T> from(values, B, K);
    ParallelFor(pool, chunks, [&](int64_t chunk) {
      const int64_t o = begin(chunk);
      Dots(weights + o * K, K, end(chunk) - o, K, from.rows.data(), B, out + o, O);
    });
    return ffi::Error::Success();
  }
  const std::vector<float> x_BK = ToFloat(values, B, K, false);
  SumOverChunks<T>(pool, chunks, B, O, out, [&](int64_t chunk, float* y_BO) {
    std::vector<float*> to;
    for (int64_t b = 0; b < B; ++b) to.push_back(y_BO + b * O);
    const int64_t k = begin(chunk);
    Axpys(weights + k * O, O, end(chunk) - k, O, x_BK.data() + k, K, B, to.data());
  });
  return ffi::Error::Success();
}

ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> layer,
                  ffi::AnyBuffer w, ffi::Result<ffi::Buffer<ffi::F32>> y, bool transposed) {
  const int64_t index = layer.typed_data()[0];
  if (x.element_type() == ffi::F32) return RunLinear<float>(pool, x, index, w, y, transposed);
  return RunLinear<BFloat16>(pool, x, index, w, y, transposed);
}

// y [B, O] = x [B, K] w[layer], w in tiles: codes [N, T, G, ...], scales [N, T, G, 16].
ffi::Error ScaledLinear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> layer,
                        ffi::RemainingArgs rest, ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t bits) {
  const int64_t B = x.dimensions()[0], O = y->dimensions()[1];
  const int64_t tiles = rest.get<ffi::AnyBuffer>(0)->dimensions()[1];
  const Scaled w = Operands{rest, layer.typed_data()[0]}.TakeScaled(bits);
  const Rounded x_BK = ToRounded(x);
  std::vector<int64_t> rows(B);
  for (int64_t b = 0; b < B; ++b) rows[b] = b;
  const int64_t chunks = NumChunks(pool, tiles);
  ParallelFor(pool, chunks, [&](int64_t chunk) {
    const int64_t first = tiles * chunk / chunks;
    const int64_t begin = first * kOutputs, end = std::min(O, tiles * (chunk + 1) / chunks * kOutputs);
    std::vector<float*> to(B);
    for (int64_t b = 0; b < B; ++b) {
      to[b] = y->typed_data() + b * O + begin;
      std::fill_n(to[b], end - begin, 0.0f);
    }
    AddProducts(w.From(first * x_BK.groups), x_BK, rows, end - begin, to.data());
  });
  return ffi::Error::Success();
}

// ---- Attention of one new token a row over the keys and values so far.

// Scores of `count` places, a multiple of kLanes, as shares of the largest, which is returned, and
// their sum; those of places that are not seen are 0.
inline std::pair<float, float> Shares(float* scores, const uint8_t* seen, int64_t count, float scale) {
  Vec most = Vec{} + kUnseen, total = {};
  for (int64_t t = 0; t < count; t += kLanes) {
    const Vec score = Masked(scores + t, seen + t, scale);
    StoreVec(scores + t, score);
    most = score > most ? score : most;
  }
  float largest = kUnseen;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
  for (int64_t t = 0; t < count; t += kLanes) {
    const Vec score = LoadVec(scores + t), share = score <= kUnseen ? Vec{} : Exp(score - largest);
    StoreVec(scores + t, share);
    total += share;
  }
  return {largest, Sum(total)};
}

// A share of the places that one row sees, for one kv head with G query heads: their largest scores,
// the sums of their shares, and y [G, C], not yet divided by them.
struct Found {
  float *most, *total, *y_GC;

  Found(float* at, int64_t G) : most(at), total(at + G), y_GC(at + 2 * G) {}
  static int64_t Size(int64_t G, int64_t C) { return G * (C + 2); }
};

// Keys and values of neighbouring tokens are `stride` apart; invisible ones are masked.
template <class T>
void AttendHead(const T* q, const T* k, const T* v, const bool* visible, int64_t G, int64_t C,
                int64_t stride, int64_t begin, int64_t end, Found found) {
  const int64_t count = end - begin, padded = (count + kLanes - 1) / kLanes * kLanes;
  const OperandRows<T> q_GC(q, G, C);
  std::vector<float> shares_GT(G * padded), sums_GC(G * C);
  std::vector<uint8_t> seen(padded);
  std::vector<float*> to;
  for (int64_t g = 0; g < G; ++g) to.push_back(sums_GC.data() + g * C);
  std::memcpy(seen.data(), visible + begin, count);
  Dots(k + begin * stride, stride, count, C, q_GC.rows.data(), G, shares_GT.data(), padded);
  for (int64_t g = 0; g < G; ++g)
    std::tie(found.most[g], found.total[g]) =
        Shares(shares_GT.data() + g * padded, seen.data(), padded, 1 / std::sqrt(float(C)));
  Axpys(v + begin * stride, stride, count, C, shares_GT.data(), padded, G, to.data());
  for (int64_t g = 0; g < G; ++g)
    for (int64_t c = 0; c < C; ++c) found.y_GC[g * C + c] = sums_GC[g * C + Place(q, c, C)];
}

// y [G, C] from `count` shares of its places, in order.
template <class T>
void Merge(float* parts, int64_t count, int64_t G, int64_t C, T* y) {
  const auto at = [&](int64_t s) { return Found(parts + s * Found::Size(G, C), G); };
  std::vector<float> sums(C);
  for (int64_t g = 0; g < G; ++g) {
    float most = kUnseen, total = 0;
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t s = 0; s < count; ++s) most = std::max(most, at(s).most[g]);
    for (int64_t s = 0; s < count; ++s) {
      const float fade = std::exp(at(s).most[g] - most), *y_C = at(s).y_GC + g * C;
      total += at(s).total[g] * fade;
      for (int64_t c = 0; c < C; ++c) sums[c] += y_C[c] * fade;
    }
    for (int64_t c = 0; c < C; ++c) Store(y + g * C + c, sums[c] / total);
  }
}

constexpr int64_t kFewestPlaces = 512;  // that are a chunk of their own

template <class T>
ffi::Error RunAttend(ffi::ThreadPool& pool, const ffi::AnyBuffer& q, const ffi::AnyBuffer& new_k,
                     const ffi::AnyBuffer& new_v, const bool* visible, int64_t layer, int64_t index,
                     ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> k,
                     ffi::Result<ffi::AnyBuffer> v) {
  const auto shape = k->dimensions();  // [N, B, T, K, C]
  const int64_t N = shape[0], B = shape[1], length = shape[2], K = shape[3], C = shape[4];
  const int64_t G = q.dimensions()[1] / K, stride = K * C;
  layer = Within(layer, N), index = Within(index, length);
  const auto at = [&](ffi::Result<ffi::AnyBuffer>& cache, int64_t b, int64_t head) {
    return static_cast<T*>(cache->untyped_data()) + ((layer * B + b) * length * K + head) * C;
  };
  std::vector<int64_t> begin(B, 0), end(B, length);
  int64_t longest = 0;
  for (int64_t b = 0; b < B; ++b) {
    for (auto [cache, added] : {std::pair{k, &new_k}, std::pair{v, &new_v}})
      std::copy_n(static_cast<const T*>(added->untyped_data()) + b * stride, stride,
                  at(cache, b, 0) + index * stride);
    const bool* seen = visible + b * length;
    while (begin[b] < length && !seen[begin[b]]) ++begin[b];
    while (end[b] > begin[b] && !seen[end[b] - 1]) --end[b];
    longest = std::max(longest, end[b] - begin[b]);
  }
  // Few heads are too few chunks for many threads: the places of long texts are cut.
  const int64_t wanted = (4 * pool.num_threads() + B * K - 1) / (B * K);
  const int64_t cuts = std::max<int64_t>(1, std::min(wanted, longest / kFewestPlaces));
  const int64_t size = Found::Size(G, C);
  static thread_local std::vector<float> kept;  // fresh memory costs a page fault every 4 KiB
  if (int64_t(kept.size()) < B * K * cuts * size) kept.resize(B * K * cuts * size);
  float* parts = kept.data();
  T* out = static_cast<T*>(y->untyped_data());
  ParallelFor(pool, B * K * cuts, [&](int64_t item) {
    const int64_t b = item / cuts / K, head = item / cuts % K, cut = item % cuts;
    const int64_t count = end[b] - begin[b];
    AttendHead(static_cast<const T*>(q.untyped_data()) + (b * K + head) * G * C, at(k, b, head),
               at(v, b, head), visible + b * length, G, C, stride, begin[b] + count * cut / cuts,
               begin[b] + count * (cut + 1) / cuts, Found(parts + item * size, G));
    if (cuts == 1) Merge(parts + item * size, 1, G, C, out + item * G * C);
  });
  for (int64_t i = 0; cuts > 1 && i < B * K; ++i)
    Merge(parts + i * cuts * size, cuts, G, C, out + i * G * C);
  return ffi::Error::Success();
}

// The caches are updated in place: XLA copies them first if it still needs the old ones.
ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer new_k, ffi::AnyBuffer new_v,
                  ffi::AnyBuffer, ffi::AnyBuffer, ffi::AnyBuffer visible,
                  ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> index,
                  ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> k,
                  ffi::Result<ffi::AnyBuffer> v) {
  const bool* seen = static_cast<const bool*>(visible.untyped_data());
  const int64_t n = layer.typed_data()[0], t = index.typed_data()[0];
  if (q.element_type() == ffi::F32)
    return RunAttend<float>(pool, q, new_k, new_v, seen, n, t, y, k, v);
  return RunAttend<BFloat16>(pool, q, new_k, new_v, seen, n, t, y, k, v);
}

// ---- Embedding: rows of a table, whatever its type.

ffi::Error Embed(ffi::Buffer<ffi::S32> tokens, ffi::AnyBuffer table, ffi::Result<ffi::AnyBuffer> y) {
  const int64_t V = table.dimensions()[0], B = tokens.element_count();
  const int64_t row_bytes = int64_t(y->size_bytes()) / std::max<int64_t>(B, 1);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t token = std::min<int64_t>(std::max<int64_t>(tokens.typed_data()[b], 0), V - 1);
    std::memcpy(static_cast<char*>(y->untyped_data()) + b * row_bytes,
                static_cast<const char*>(table.untyped_data()) + token * row_bytes, row_bytes);
  }
  return ffi::Error::Success();
}

// ---- Reading alone, for benchmarks: how fast memory can be read at all.

ffi::Error Read(ffi::ThreadPool pool, ffi::AnyBuffer data, ffi::Result<ffi::Buffer<ffi::S32>> y) {
  const int64_t words = int64_t(data.size_bytes()) / 64, chunks = NumChunks(pool, words);
  const char* bytes = static_cast<const char*>(data.untyped_data());
  std::vector<int32_t> sums(chunks);
  ParallelFor(pool, chunks, [&](int64_t chunk) {
    Bits16 some[4] = {};  // enough to hide the latency of additions
    int64_t i = words * chunk / chunks;
    const int64_t end = words * (chunk + 1) / chunks;
    const auto add = [&](int k, int64_t word) {
      Bits16 read;
      std::memcpy(&read, bytes + word * 64, sizeof read);
      some[k] += read;
    };
    for (; i + 4 <= end; i += 4)
      for (int k = 0; k < 4; ++k) add(k, i + k);
    for (; i < end; ++i) add(0, i);
    const Bits16 all = some[0] + some[1] + some[2] + some[3];
    for (int k = 0; k < 16; ++k) sums[chunk] += int32_t(all[k]);
  });
  y->typed_data()[0] = 0;
  for (const int32_t sum : sums) y->typed_data()[0] ^= sum;
  return ffi::Error::Success();
}

}  // namespace

extern "C" int LteJaxHasPanels() { return kHasPanels; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(LteJaxAttend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(LteJaxEmbed, Embed,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

auto BindFfn() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .RemainingArgs()
      .Ret<ffi::AnyBuffer>()
      .Attr<int64_t>("activation")
      .Attr<bool>("has_gate")
      .Attr<bool>("has_up_bias")
      .Attr<bool>("has_gate_bias");
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(LteJaxFfn, Ffn, BindFfn());

XLA_FFI_DEFINE_HANDLER_SYMBOL(LteJaxLinear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("transposed"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(LteJaxScaledFfn, ScaledFfn,
                              BindFfn().Attr<int64_t>("bits").Attr<int64_t>("neurons"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(LteJaxScaledLinear, ScaledLinear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(LteJaxRead, Read,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
