// What the kernels for CPUs share: vectors and threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// ---- Vectors: the extension of GCC and Clang, which split them if the CPU's are shorter.
//
// Weights are read kStep at a time, as two vectors. A bfloat16 is the upper half of a float, so of a
// 32-bit word that holds two of them, a shift makes the even one a float and a mask the odd one,
// without shuffling. x and sums are stored in the resulting order, given by Place: in each block of
// kStep the even elements, then the odd ones. With float weights the order is unchanged.

#ifdef __AVX512F__
constexpr int kLanes = 16, kTile = 4;  // kTile rows of x at a time: as many as fit in registers
#else
constexpr int kLanes = 8, kTile = 2;
#endif
constexpr int kStep = 2 * kLanes;
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));

struct BFloat16 {
  uint16_t bits;
};
struct Pair {
  Vec first, second;
};

inline float Load(const float* p) { return *p; }
inline float Load(const BFloat16* p) {
  const uint32_t bits = uint32_t(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline Vec LoadVec(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void StoreVec(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Pair LoadPair(const float* p) { return {LoadVec(p), LoadVec(p + kLanes)}; }
inline Pair LoadPair(const BFloat16* p) {
  Bits bits;
  std::memcpy(&bits, p, sizeof bits);
  return {(Vec)(bits << 16), (Vec)(bits & 0xffff0000u)};
}

inline int64_t Place(const float*, int64_t i, int64_t) { return i; }
inline int64_t Place(const BFloat16*, int64_t i, int64_t width) {
  if (i >= width / kStep * kStep) return i;  // the remainder keeps its order
  const int64_t r = i % kStep;
  return i - r + r % 2 * kLanes + r / 2;
}

inline void Store(float* p, float value) { *p = value; }
inline void Store(BFloat16* p, float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  p->bits = nan ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Up to a vector of values as floats, the rest zero.
template <class T>
inline Vec LoadSome(const T* p, int64_t count) {
  if constexpr (std::is_same_v<T, float>)
    if (count >= kLanes) return LoadVec(p);
  Vec v = {};
  for (int64_t i = 0; i < std::min<int64_t>(count, kLanes); ++i) v[i] = Load(p + i);
  return v;
}
inline void StoreSome(float* p, Vec v, int64_t count) {
  std::memcpy(p, &v, std::min<int64_t>(count, kLanes) * sizeof *p);
}

// e to the power of x, to 2e-7 of it between -87 and 88, outside of which it stays where it is there:
// 2^n times a polynomial of the rest (Cephes, expf), of which 2^n is put together from its bits.
inline Vec Exp(Vec x) {
  x = x < -87.3f ? Vec{} - 87.3f : x > 88.3f ? Vec{} + 88.3f : x;
  const Vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * (Vec)(((Bits)shifted << 23) + 0x3f800000u);
}

// Scores of attention, times scale, where `seen` is not 0; kUnseen elsewhere. What is not a number is
// not below kUnseen either, so it goes on into the result.
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
constexpr float kUnseen = -3e38f;

inline Vec Masked(const float* scores, const uint8_t* seen, float scale) {
  Bytes bytes;
  std::memcpy(&bytes, seen, sizeof bytes);
  const Ints sees = __builtin_convertvector(bytes, Ints) != 0;
  return sees ? LoadVec(scores) * scale : Vec{} + kUnseen;
}

inline int64_t Within(int64_t i, int64_t size) {
  return std::min(std::max<int64_t>(i, 0), size - 1);
}

inline float Sum(Vec v) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// ---- Threads.

constexpr int kLooks = 20000;  // a fraction of a millisecond

inline void Pause() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

// Calls work(0) ... work(chunks - 1) on XLA's threads and this one. This thread takes chunks too and
// waits only for those that others have begun, so it ends even if the pool never runs a helper, as
// when several calls share few threads. It looks out for their end before it sleeps: a decode step is
// a hundred short calls, and to be woken takes as long as to read a megabyte.
template <class Work>
void ParallelFor(ffi::ThreadPool& pool, int64_t chunks, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto shared = std::make_shared<Shared>();
  auto take = [shared, chunks, &work] {  // `work` lives until the last chunk is done
    for (int64_t chunk; (chunk = shared->next.fetch_add(1)) < chunks;) {
      work(chunk);
      if (shared->done.fetch_add(1) + 1 < chunks) continue;
      std::lock_guard<std::mutex> lock(shared->mutex);
      shared->all_done.notify_one();
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), chunks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([take] { take(); });
  take();
  for (int i = 0; i < kLooks && shared->done < chunks; ++i) Pause();
  if (shared->done == chunks) return;
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == chunks; });
}

}  // namespace
