// fastadv::linf_step on the CPU: sign, step, ball, box, mask and non-finite flag in one pass over memory, in place.
#include <algorithm>

#include "step.h"

namespace fastadv {
namespace {

struct Image {
  float step_size, eps, lo, hi;
};

// Pixels that are handed to a thread at a time: 32768 are 0.5 MB of traffic, some 30 us.
constexpr int64_t kGrain = 1 << 15;

template <class G, bool kMasked>
FASTADV_INLINE uint32_t walk(float* adv, const typename G::Bits* grad, const float* x, const uint8_t* mask, int64_t n,
                             Image image) {
  uint32_t bad = 0;
  // No pixel depends on another one (x and grad never overlap adv).
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const float g = G::widen(grad[i]), clean = x[i];
    bad |= is_nonfinite<G>(grad[i]);
    const float moved = adv[i] + ((g > 0.f ? image.step_size : 0.f) - (g < 0.f ? image.step_size : 0.f));
    const float inside = clamp(moved, ball_edge<false>(clean, -image.eps), ball_edge<true>(clean, image.eps));
    const float y = clamp(inside, image.lo, image.hi);
    adv[i] = !kMasked || mask[i] ? y : clean;
  }
  return bad;
}

// target_clones does not reach through templates, hence one plain function per case.
#define FASTADV_WALK(NAME, TYPE, MASKED)                                                                           \
  FASTADV_CLONES uint32_t NAME(float* adv, const void* grad, const float* x, const uint8_t* mask, int64_t n,       \
                               Image image) {                                                                      \
    return walk<TYPE, MASKED>(adv, static_cast<const TYPE::Bits*>(grad), x, mask, n, image);                       \
  }
FASTADV_WALK(walk_float, Float, false)
FASTADV_WALK(walk_float_masked, Float, true)
FASTADV_WALK(walk_bfloat16, BFloat16, false)
FASTADV_WALK(walk_bfloat16_masked, BFloat16, true)
FASTADV_WALK(walk_half, Half, false)
FASTADV_WALK(walk_half_masked, Half, true)
#undef FASTADV_WALK

void linf_step(const Tensor& adv, const Tensor& grad, const Tensor& x, const Tensor& step_size, const Tensor& eps,
               double lo, double hi, const std::optional<Tensor>& mask, const std::optional<Tensor>& nonfinite) {
  const Step step = checked("linf_step", adv, grad, x, step_size, eps, lo, hi, mask, nonfinite);
  const bool masked = step.mask != nullptr;
  const auto walk = step.grad_type == ScalarType::Float      ? (masked ? walk_float_masked : walk_float)
                    : step.grad_type == ScalarType::BFloat16 ? (masked ? walk_bfloat16_masked : walk_bfloat16)
                                                             : (masked ? walk_half_masked : walk_half);
  const int64_t grad_bytes = step.grad_type == ScalarType::Float ? 4 : 2;
  torch::stable::parallel_for(0, step.images * step.pixels, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / step.pixels, stop = std::min(end, (image + 1) * step.pixels);
      const Image settings{step.step_of(image), step.eps_of(image), step.lo, step.hi};
      const char* grad_at = static_cast<const char*>(step.grad) + begin * grad_bytes;
      const uint8_t* mask_at = masked ? step.mask + begin : nullptr;
      if (walk(step.adv + begin, grad_at, step.x + begin, mask_at, stop - begin, settings)) step.flag(image);
      begin = stop;
    }
  });
}

}  // namespace
}  // namespace fastadv

STABLE_TORCH_LIBRARY_FRAGMENT(fastadv, m) {
  m.def(
      "linf_step(Tensor(a!) adv, Tensor grad, Tensor x, Tensor step_size, Tensor eps, float lo, float hi, "
      "Tensor? mask=None, Tensor(b!)? nonfinite=None) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastadv, CPU, m) { m.impl("linf_step", TORCH_BOX(&fastadv::linf_step)); }
