// Softmax attention for training on a CPU, forwards and backwards, in float32. XLA's own writes out
// every score several times and lays q, k and v out anew for each product.
//
// Of a text's keys and one query, scores are s_t = q k_t / sqrt(C), shares p_t = exp(s_t) / sum exp,
// and y = sum_t p_t v_t over the keys it sees. Backwards, from dy: the shares again, from the logarithm
// of the sum; dp_t = dy v_t, ds_t = p_t (dp_t - y dy), and from those dq, dk and dv (FlashAttention,
// arXiv 2205.14135, appendix B.2). kQueries queries at a time are compared with all keys, so memory
// grows with T alone. One thread computes a key head of a text with all its query heads, in order:
// the same input gives the same bits on any number of threads.
//
// Letters: B texts  L queries  T = L keys  H query heads  K key heads  G = H/K  C head width

#include "cpu_common.h"

namespace {

constexpr int kRows = 6, kWide = kLanes == 16 ? 4 : 2;  // sums in registers: kRows x kWide vectors
constexpr int64_t kQueries = 8 * kRows;

// A matrix whose element (i, j) is at[i * row + j * column].
struct Matrix {
  const float* at;
  int64_t row, column;
};

template <int R, int W>
inline void ProductTile(int64_t K, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row,
                        bool add) {
  Vec sums[R][W] = {};
  for (int64_t k = 0; k < K; ++k) {
    Vec right[W];
    for (int w = 0; w < W; ++w) right[w] = LoadVec(b + k * b_row + w * kLanes);
    for (int r = 0; r < R; ++r) {
      const float left = a.at[r * a.row + k * a.column];
      for (int w = 0; w < W; ++w) sums[r][w] += left * right[w];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) {
      float* out = c + r * c_row + w * kLanes;
      StoreVec(out, add ? LoadVec(out) + sums[r][w] : sums[r][w]);
    }
}

template <int W>
inline void ProductColumns(int64_t M, int64_t K, Matrix a, const float* b, int64_t b_row, float* c,
                           int64_t c_row, bool add) {
  int64_t m = 0;
  const auto left = [&] { return Matrix{a.at + m * a.row, a.row, a.column}; };
  for (; m + kRows <= M; m += kRows)
    ProductTile<kRows, W>(K, left(), b, b_row, c + m * c_row, c_row, add);
  for (; m + 4 <= M; m += 4) ProductTile<4, W>(K, left(), b, b_row, c + m * c_row, c_row, add);
  for (; m < M; ++m) ProductTile<1, W>(K, left(), b, b_row, c + m * c_row, c_row, add);
}

// c [M, N] = a [M, K] b [K, N], or added to c; N is a multiple of kLanes, rows of b and c are plain.
void Product(int64_t M, int64_t N, int64_t K, Matrix a, const float* b, int64_t b_row, float* c,
             int64_t c_row, bool add = false) {
  int64_t n = 0;
  for (; n + kWide * kLanes <= N; n += kWide * kLanes)
    ProductColumns<kWide>(M, K, a, b + n, b_row, c + n, c_row, add);
  for (; n < N; n += kLanes) ProductColumns<1>(M, K, a, b + n, b_row, c + n, c_row, add);
}

// out [C, padded] of the rows in [T, C], zeros behind them.
void Transpose(const float* in, int64_t in_row, int64_t T, int64_t C, float* out, int64_t padded) {
  for (int64_t c = 0; c < C; ++c) std::fill(out + c * padded + T, out + (c + 1) * padded, 0.0f);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t c = 0; c < C; ++c) out[c * padded + t] = in[t * in_row + c];
}

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

struct Shape {
  int64_t B, L, H, K, C, G, padded;
  float scale;
  bool causal;

  int64_t q_row() const { return H * C; }
  int64_t k_row() const { return K * C; }
};

// The queries of one head at hand, and the keys they are compared with.
struct Block {
  int64_t first, rows, keys, wide;  // wide: keys, rounded up to whole vectors

  Block(const Shape& s, int64_t first)
      : first(first),
        rows(std::min(kQueries, s.L - first)),
        keys(s.causal ? first + rows : s.L),
        wide((keys + kLanes - 1) / kLanes * kLanes) {}
};

constexpr float kUnseen = -3e38f;

// Scores of what a query sees, times scale; kUnseen elsewhere. `seen` is as wide as the block. What is
// not a number is not below kUnseen either, so it goes on into y.
inline Vec Scaled(const float* scores, const uint8_t* seen, float scale) {
  Bytes bytes;
  std::memcpy(&bytes, seen, sizeof bytes);
  const Ints sees = __builtin_convertvector(bytes, Ints) != 0;
  return sees ? LoadVec(scores) * scale : Vec{} + kUnseen;
}

// Calls row(r, seen) for each query of the block, `seen` with zeros behind the keys.
template <class Row>
void ForRows(const Shape& s, const Block& block, const bool* visible, uint8_t* seen, const Row& row) {
  std::fill(seen + block.keys, seen + block.wide, 0);
  for (int64_t r = 0; r < block.rows; ++r) {
    std::memcpy(seen, visible + (block.first + r) * s.L, block.keys);
    row(r, seen);
  }
}

struct Scratch {  // of one thread: fresh memory costs a page fault every 4 KiB
  std::vector<float> k_CT, v_CT, shares, slopes, dk_TC, dv_TC;
  std::vector<uint8_t> seen;

  explicit Scratch(const Shape& s)
      : k_CT(s.C * s.padded), v_CT(s.C * s.padded), shares(kQueries * s.padded),
        slopes(kQueries * s.padded), dk_TC(s.padded * s.C), dv_TC(s.padded * s.C), seen(s.padded) {}
};

void Forwards(const Shape& s, int64_t b, int64_t kv, const float* q, const float* k, const float* v,
              const bool* visible, float* y, float* logsum, Scratch& scratch) {
  float *shares = scratch.shares.data(), *k_CT = scratch.k_CT.data();
  k += b * s.L * s.k_row() + kv * s.C;
  v += b * s.L * s.k_row() + kv * s.C;
  visible += b * s.L * s.L;
  Transpose(k, s.k_row(), s.L, s.C, k_CT, s.padded);
  for (int64_t h = kv * s.G; h < (kv + 1) * s.G; ++h) {
    const int64_t head = b * s.L * s.q_row() + h * s.C;
    float* sums = logsum + (b * s.H + h) * s.L;
    for (int64_t first = 0; first < s.L; first += kQueries) {
      const Block block(s, first);
      const int64_t at = head + first * s.q_row();
      Product(block.rows, block.wide, s.C, {q + at, s.q_row(), 1}, k_CT, s.padded, shares, s.padded);
      ForRows(s, block, visible, scratch.seen.data(), [&](int64_t r, const uint8_t* seen) {
        float* row = shares + r * s.padded;
        for (int64_t t = 0; t < block.wide; t += kLanes)
          StoreVec(row + t, Scaled(row + t, seen + t, s.scale));
        const float most = *std::max_element(row, row + block.wide);
        Vec sum = {};
        for (int64_t t = 0; t < block.wide; t += kLanes) {
          const Vec score = LoadVec(row + t), e = score <= kUnseen ? Vec{} : Exp(score - most);
          StoreVec(row + t, e);
          sum += e;
        }
        const float total = std::max(Sum(sum), 1e-30f);  // 1 or more where anything is seen
        for (int64_t t = 0; t < block.wide; t += kLanes) StoreVec(row + t, LoadVec(row + t) / total);
        sums[first + r] = most + std::log(total);
      });
      Product(block.rows, s.C, block.keys, {shares, s.padded, 1}, v, s.k_row(), y + at, s.q_row());
    }
  }
}

void Backwards(const Shape& s, int64_t b, int64_t kv, const float* q, const float* k, const float* v,
               const bool* visible, const float* y, const float* logsum, const float* dy, float* dq,
               float* dk, float* dv, Scratch& scratch) {
  float *shares = scratch.shares.data(), *slopes = scratch.slopes.data();
  float *k_CT = scratch.k_CT.data(), *v_CT = scratch.v_CT.data();
  float *dk_TC = scratch.dk_TC.data(), *dv_TC = scratch.dv_TC.data();
  const int64_t keys_at = b * s.L * s.k_row() + kv * s.C;
  k += keys_at;
  v += keys_at;
  visible += b * s.L * s.L;
  Transpose(k, s.k_row(), s.L, s.C, k_CT, s.padded);
  Transpose(v, s.k_row(), s.L, s.C, v_CT, s.padded);
  std::fill_n(dk_TC, s.padded * s.C, 0.0f);
  std::fill_n(dv_TC, s.padded * s.C, 0.0f);
  for (int64_t h = kv * s.G; h < (kv + 1) * s.G; ++h) {
    const int64_t head = b * s.L * s.q_row() + h * s.C;
    const float* sums = logsum + (b * s.H + h) * s.L;
    for (int64_t first = 0; first < s.L; first += kQueries) {
      const Block block(s, first);
      const int64_t at = head + first * s.q_row(), rows = block.rows;
      Product(rows, block.wide, s.C, {q + at, s.q_row(), 1}, k_CT, s.padded, shares, s.padded);
      Product(rows, block.wide, s.C, {dy + at, s.q_row(), 1}, v_CT, s.padded, slopes, s.padded);
      ForRows(s, block, visible, scratch.seen.data(), [&](int64_t r, const uint8_t* seen) {
        float *row = shares + r * s.padded, *slope = slopes + r * s.padded;
        const float *y_C = y + at + r * s.q_row(), *dy_C = dy + at + r * s.q_row();
        Vec products = {};
        for (int64_t c = 0; c < s.C; c += kLanes) products += LoadVec(y_C + c) * LoadVec(dy_C + c);
        const float mean = Sum(products), logarithm = sums[first + r];
        for (int64_t t = 0; t < block.wide; t += kLanes) {
          const Vec score = Scaled(row + t, seen + t, s.scale);
          const Vec share = score <= kUnseen ? Vec{} : Exp(score - logarithm);
          StoreVec(row + t, share);
          StoreVec(slope + t, share * (LoadVec(slope + t) - mean) * s.scale);
        }
      });
      Product(block.wide, s.C, rows, {shares, 1, s.padded}, dy + at, s.q_row(), dv_TC, s.C, true);
      Product(block.wide, s.C, rows, {slopes, 1, s.padded}, q + at, s.q_row(), dk_TC, s.C, true);
      Product(rows, s.C, block.keys, {slopes, s.padded, 1}, k, s.k_row(), dq + at, s.q_row());
    }
  }
  for (int64_t t = 0; t < s.L; ++t) {
    std::copy_n(dk_TC + t * s.C, s.C, dk + keys_at + t * s.k_row());
    std::copy_n(dv_TC + t * s.C, s.C, dv + keys_at + t * s.k_row());
  }
}

using Floats = ffi::Buffer<ffi::F32, 4>;
using Sums = ffi::Buffer<ffi::F32, 3>;
using Mask = ffi::Buffer<ffi::PRED, 3>;
using Out = ffi::Result<Floats>;

// The shape, and work(b, kv, scratch) for each key head of each text.
template <class Work>
ffi::Error ForHeads(ffi::ThreadPool& pool, const Floats& q, const Floats& k, bool causal,
                    const Work& work) {
  const auto sizes = q.dimensions();
  Shape s;
  s.B = sizes[0], s.L = sizes[1], s.H = sizes[2], s.C = sizes[3], s.K = k.dimensions()[2];
  if (s.C % kLanes || s.H % s.K || k.dimensions()[1] != s.L)
    return ffi::Error::InvalidArgument("attention: operands do not fit each other or the vectors");
  s.G = s.H / s.K;
  s.padded = (s.L + kLanes - 1) / kLanes * kLanes;
  s.scale = 1 / std::sqrt(float(s.C));
  s.causal = causal;
  ParallelFor(pool, s.B * s.K, [&](int64_t item) {
    static thread_local std::unique_ptr<Scratch> kept;
    static thread_local int64_t of[2] = {};
    if (!kept || of[0] != s.padded || of[1] != s.C) {
      kept = std::make_unique<Scratch>(s);
      of[0] = s.padded, of[1] = s.C;
    }
    work(s, item / s.K, item % s.K, *kept);
  });
  return ffi::Error::Success();
}

ffi::Error Attention(ffi::ThreadPool pool, bool causal, Floats q, Floats k, Floats v, Mask visible,
                     Out y, ffi::Result<Sums> logsum) {
  return ForHeads(pool, q, k, causal, [&](const Shape& s, int64_t b, int64_t kv, Scratch& scratch) {
    Forwards(s, b, kv, q.typed_data(), k.typed_data(), v.typed_data(), visible.typed_data(),
             y->typed_data(), logsum->typed_data(), scratch);
  });
}

ffi::Error AttentionSlopes(ffi::ThreadPool pool, bool causal, Floats q, Floats k, Floats v,
                           Mask visible, Floats y, Sums logsum, Floats dy, Out dq, Out dk, Out dv) {
  return ForHeads(pool, q, k, causal, [&](const Shape& s, int64_t b, int64_t kv, Scratch& scratch) {
    Backwards(s, b, kv, q.typed_data(), k.typed_data(), v.typed_data(), visible.typed_data(),
              y.typed_data(), logsum.typed_data(), dy.typed_data(), dq->typed_data(),
              dk->typed_data(), dv->typed_data(), scratch);
  });
}

}  // namespace

extern "C" int LteJaxLanes() { return kLanes; }

auto Bind() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<bool>("causal")
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Mask>();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(LteJaxAttention, Attention, Bind().Ret<Floats>().Ret<Sums>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(LteJaxAttentionSlopes, AttentionSlopes,
                              Bind()
                                  .Arg<Floats>()
                                  .Arg<Sums>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
