// Softmax attention of many queries on a CPU: for training, forwards and backwards, in float32, and of
// a prompt's queries over a cache (at the end). XLA's own writes out every score several times and lays
// q, k and v out anew for each product.
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
          StoreVec(row + t, Masked(row + t, seen + t, s.scale));
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
          const Vec score = Masked(row + t, seen + t, s.scale);
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

// ---- A prompt's queries over the keys and values of a cache.
//
// kAcross queries at a time are compared with kKeys keys at a time, however many there are: the largest
// score so far, the sum of the shares and y are put right as larger scores come (FlashAttention,
// appendix B.1). Scores are laid out [key, query], so that what is done for each query is done for a
// vector of them, and keys and values are read as they lie. Blocks of keys that no query sees are
// passed over. Letters beside those above: A = kAcross.

constexpr int64_t kKeys = 128, kAcross = 64;

template <class T>
void ToFloats(const T* in, int64_t in_row, int64_t rows, int64_t columns, float* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[r * columns + c] = Load(in + r * in_row + c);
}

// Some queries of the G heads of a key head: the heads are C apart, tokens `row`; token r sees place t
// of them all if visible[r * places + t].
template <class T>
struct Queries {
  const T* at;
  int64_t row, tokens, G, C;
  const bool* visible;
  int64_t places;
};

// The keys and values of a text and key head, tokens `row` apart.
template <class T>
struct Cached {
  const T *k, *v;
  int64_t row;
};

// Which of `keys` keys from `first` on the queries see: none any, all all, or some some: then it is
// written into seen [keys, A].
enum class Sees { kNone, kAll, kSome };

template <class T>
Sees Look(const Queries<T>& q, int64_t first, int64_t keys, uint8_t* seen) {
  bool any = false, all = true;
  for (int64_t r = 0; r < q.tokens; ++r) {
    const bool* row = q.visible + r * q.places + first;
    any = any || std::memchr(row, 1, keys);
    all = all && !std::memchr(row, 0, keys);
  }
  if (!any || all) return any ? Sees::kAll : Sees::kNone;
  std::fill_n(seen, keys * kAcross, 0);
  for (int64_t r = 0; r < q.tokens; ++r)
    for (int64_t t = 0; t < keys; ++t) seen[t * kAcross + r] = q.visible[r * q.places + first + t];
  return Sees::kSome;
}

// What they have found so far. One of a thread: fresh memory costs a page fault every 4 KiB.
struct Found {
  std::vector<float> q_GCA, y_GCA, most_GA, sum_GA, k_TC, v_TC, scores_TA;
  std::vector<uint8_t> seen_TA;

  template <class T>
  void Begin(const Queries<T>& q) {
    const int64_t size = q.G * q.C * kAcross;
    const float scale = 1 / std::sqrt(float(q.C));
    q_GCA.assign(size, 0), y_GCA.assign(size, 0), sum_GA.assign(q.G * kAcross, 0);
    most_GA.assign(q.G * kAcross, kUnseen), k_TC.resize(kKeys * q.C), v_TC.resize(kKeys * q.C);
    scores_TA.resize(kKeys * kAcross), seen_TA.resize(kKeys * kAcross);
    for (int64_t a = 0; a < q.tokens; ++a)
      for (int64_t i = 0; i < q.G * q.C; ++i)
        q_GCA[i * kAcross + a] = Load(q.at + a * q.row + i) * scale;
  }

  // Scores of `keys` keys become shares of the largest so far; y and the sums so far follow it.
  void Follow(int64_t g, int64_t keys, int64_t C, const uint8_t* seen) {
    constexpr int64_t kVecs = kAcross / kLanes;
    float *scores = scores_TA.data(), *most = &most_GA[g * kAcross], *sum = &sum_GA[g * kAcross];
    Vec now[kVecs], total[kVecs] = {};
    for (int64_t a = 0; a < kVecs; ++a) now[a] = LoadVec(most + a * kLanes);
    for (int64_t i = 0; i < keys * kAcross; i += kAcross)
      for (int64_t a = 0; a < kVecs; ++a) {
        float* at = scores + i + a * kLanes;
        if (seen) StoreVec(at, Masked(at, seen + i + a * kLanes, 1));
        const Vec score = LoadVec(at);
        now[a] = score > now[a] ? score : now[a];
      }
    for (int64_t i = 0; i < keys * kAcross; i += kAcross)
      for (int64_t a = 0; a < kVecs; ++a) {
        float* at = scores + i + a * kLanes;
        const Vec score = LoadVec(at), share = score <= kUnseen ? Vec{} : Exp(score - now[a]);
        StoreVec(at, share);
        total[a] += share;
      }
    for (int64_t a = 0; a < kVecs; ++a) {
      const Vec before = LoadVec(most + a * kLanes);
      const Vec fade = before <= kUnseen ? Vec{} : Exp(before - now[a]);
      StoreVec(most + a * kLanes, now[a]);
      StoreVec(sum + a * kLanes, LoadVec(sum + a * kLanes) * fade + total[a]);
      for (int64_t c = 0; c < C; ++c) {
        float* at = &y_GCA[(g * C + c) * kAcross + a * kLanes];
        StoreVec(at, LoadVec(at) * fade);
      }
    }
  }

  template <class T>
  void Compare(const Queries<T>& q, const Cached<T>& cache, int64_t end) {
    for (int64_t t = 0; t < end; t += kKeys) {
      const int64_t keys = std::min(kKeys, end - t);
      const Sees sees = Look(q, t, keys, seen_TA.data());
      if (sees == Sees::kNone) continue;
      ToFloats(cache.k + t * cache.row, cache.row, keys, q.C, k_TC.data());
      ToFloats(cache.v + t * cache.row, cache.row, keys, q.C, v_TC.data());
      for (int64_t g = 0; g < q.G; ++g) {
        const int64_t head = g * q.C * kAcross;
        float *scores = scores_TA.data(), *y_CA = &y_GCA[head];
        Product(keys, kAcross, q.C, {k_TC.data(), q.C, 1}, &q_GCA[head], kAcross, scores, kAcross);
        Follow(g, keys, q.C, sees == Sees::kSome ? seen_TA.data() : nullptr);
        Product(q.C, kAcross, keys, {v_TC.data(), 1, q.C}, scores, kAcross, y_CA, kAcross, true);
      }
    }
  }
};

template <class T>
const T* Of(const ffi::AnyBuffer& x) {
  return static_cast<const T*>(x.untyped_data());
}

template <class T>
ffi::Error RunMany(ffi::ThreadPool& pool, const ffi::AnyBuffer& q, const ffi::AnyBuffer& k,
                   const ffi::AnyBuffer& v, const bool* visible, int64_t layer, int64_t end,
                   ffi::Result<ffi::AnyBuffer> y) {
  const auto sizes = q.dimensions(), cache = k.dimensions();  // [B, L, H, C], [N, B, T, K, C]
  const int64_t B = sizes[0], L = sizes[1], H = sizes[2], C = sizes[3], places = cache[2], K = cache[3];
  const int64_t G = H / K, blocks = (L + kAcross - 1) / kAcross;
  layer = Within(layer, cache[0]), end = Within(end, places + 1);
  ParallelFor(pool, B * K * blocks, [&](int64_t item) {
    static thread_local Found found;
    const int64_t first = item % blocks * kAcross, kv = item / blocks % K, b = item / blocks / K;
    const int64_t heads = (b * L + first) * H * C + kv * G * C;
    const Queries<T> queries{Of<T>(q) + heads, H * C, std::min(kAcross, L - first), G, C,
                             visible + (b * L + first) * places, places};
    const int64_t keys = (layer * B + b) * places * K * C + kv * C;
    found.Begin(queries);
    found.Compare(queries, Cached<T>{Of<T>(k) + keys, Of<T>(v) + keys, K * C}, end);
    T* out = static_cast<T*>(y->untyped_data()) + heads;
    for (int64_t a = 0; a < queries.tokens; ++a)
      for (int64_t i = 0; i < G * C; ++i) {
        const float total = std::max(found.sum_GA[i / C * kAcross + a], 1e-30f);
        Store(out + a * H * C + i, found.y_GCA[i * kAcross + a] / total);
      }
  });
  return ffi::Error::Success();
}

ffi::Error AttendMany(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                      Mask visible, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> end,
                      ffi::Result<ffi::AnyBuffer> y) {
  const int64_t n = layer.typed_data()[0], t = end.typed_data()[0];
  if (q.element_type() == ffi::F32)
    return RunMany<float>(pool, q, k, v, visible.typed_data(), n, t, y);
  return RunMany<BFloat16>(pool, q, k, v, visible.typed_data(), n, t, y);
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(LteJaxAttendMany, AttendMany,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Mask>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
