// What the attack steps share: argument checks, reading of 32 and 16 bit gradients, and the exact edge of the ball.
// LibTorch stable ABI only: no at::, no c10::. Meaning of every op: fastadv/reference.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <bit>
#include <cstdint>
#include <optional>

// One body per instruction set, chosen when the library is loaded. The names are those gcc 12 takes;
// "avx512f,avx512vl" is refused. Needs ifunc, hence glibc.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FASTADV_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTADV_CLONES
#endif
#define FASTADV_INLINE __attribute__((always_inline)) inline

namespace fastadv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Float {
  using Bits = uint32_t;
  static constexpr Bits kMagnitude = 0x7fffffff, kInf = 0x7f800000;
  static FASTADV_INLINE float widen(Bits bits) { return std::bit_cast<float>(bits); }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr Bits kMagnitude = 0x7fff, kInf = 0x7f80;
  static FASTADV_INLINE float widen(Bits bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

struct Half {
  using Bits = uint16_t;
  static constexpr Bits kMagnitude = 0x7fff, kInf = 0x7c00;
  // Integer arithmetic, because scalar F16C conversions do not vectorise under every instruction set above.
  static FASTADV_INLINE float widen(Bits bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = uint32_t(bits & kMagnitude) << 13;
    const uint32_t normal = magnitude + ((127 - 15) << 23), special = magnitude + ((255 - 31) << 23);
    // A subnormal half is an integer multiple of 2^-24: put it into the mantissa of 2^-14 and take 2^-14 away.
    const float least = std::bit_cast<float>(uint32_t{113} << 23);
    const float subnormal = std::bit_cast<float>(magnitude + (uint32_t{113} << 23)) - least;
    uint32_t wide = magnitude < (uint32_t{1} << 23) ? std::bit_cast<uint32_t>(subnormal) : normal;
    wide = magnitude >= (uint32_t{kInf} << 13) ? special : wide;
    return std::bit_cast<float>(wide | sign);
  }
};

template <class G>
FASTADV_INLINE uint32_t is_nonfinite(typename G::Bits bits) {
  return (bits & G::kMagnitude) >= G::kInf;
}

// x + offset, taken one float back towards x where rounding carried it further than offset is long. kUp: offset > 0.
// The error of the sum is exact (Knuth's two-sum), which is why this project is built without fast-math.
template <bool kUp>
FASTADV_INLINE float ball_edge(float x, float offset) {
  const float edge = x + offset, back = edge - x;
  const float error = (x - (edge - back)) + (offset - back);
  const bool too_far = kUp ? error < 0.f : error > 0.f;
  const int32_t bits = std::bit_cast<int32_t>(edge), above = (bits >> 31) | 1;
  return std::bit_cast<float>(bits - (too_far ? (kUp ? above : -above) : 0));
}

FASTADV_INLINE float ball_edge(float x, float offset) {
  return offset > 0.f ? ball_edge<true>(x, offset) : ball_edge<false>(x, offset);
}

FASTADV_INLINE float clamp(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// One call's arguments, checked. A stride of 0 reads the one value that all images share.
struct Step {
  int64_t images, pixels;
  float* adv;
  const void* grad;
  ScalarType grad_type;
  const float* x;
  const float *step_size, *eps;
  int64_t step_stride, eps_stride;
  float lo, hi;
  const uint8_t* mask;
  int32_t* nonfinite;

  float step_of(int64_t image) const { return step_size[image * step_stride]; }
  float eps_of(int64_t image) const { return eps[image * eps_stride]; }
  // Threads that share an image all write the same 1.
  void flag(int64_t image) const {
    if (nonfinite) std::atomic_ref<int32_t>(nonfinite[image]).store(1, std::memory_order_relaxed);
  }
};

Step checked(const char* op, const Tensor& adv, const Tensor& grad, const Tensor& x, const Tensor& step_size,
             const Tensor& eps, double lo, double hi, const std::optional<Tensor>& mask,
             const std::optional<Tensor>& nonfinite);

}  // namespace fastadv
