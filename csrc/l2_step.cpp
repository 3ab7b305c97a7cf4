// fastadv::l2_step on the CPU: three passes over one image at a time, which stays in the cache between them.
#include <cmath>

#include "step.h"

namespace fastadv {
namespace {

// As in reference.py, which gives the reasons.
constexpr double kScale = 1.0 - 0x1p-20, kLimit = 1.0 - 0x1p-32;
// Sums run in this many lanes side by side: they vectorise without reordering, and are the same on every machine.
constexpr int64_t kLanes = 16;

struct Image {
  float* adv;
  const void* grad;
  const float* x;
  const uint8_t* mask;
  int64_t n;
  float step_size, eps, lo, hi;
};

template <class Term>
FASTADV_INLINE double sum(int64_t n, Term term) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) lanes[lane] += term(i);
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}

template <class G, bool kMasked>
FASTADV_INLINE bool walk(const Image& image) {
  float* const adv = image.adv;
  const auto* const grad = static_cast<const typename G::Bits*>(image.grad);
  const float* const x = image.x;
  const uint8_t* const mask = image.mask;
  const int64_t n = image.n;

  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= is_nonfinite<G>(grad[i]);
  const auto direction = [&](int64_t i) { return !kMasked || mask[i] ? double(G::widen(grad[i])) : 0.0; };
  const double norm = std::sqrt(sum(n, [&](int64_t i) { return direction(i) * direction(i); }));
  const bool moves = norm > 0 && norm < INFINITY;
  const double rate = moves ? double(image.step_size) / norm : 0.0;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const float y = adv[i] + (moves ? float(direction(i) * rate) : 0.f);
    adv[i] = !kMasked || mask[i] ? y : x[i];
  }
  const auto offset = [&](int64_t i) { return double(adv[i]) - double(x[i]); };
  const double length = std::sqrt(sum(n, [&](int64_t i) { return offset(i) * offset(i); }));
  const bool outside = length > double(image.eps) * kLimit;
  const double shrink = outside ? double(image.eps) * kScale / length : 1.0;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const float y = outside ? ball_edge(x[i], float(offset(i) * shrink)) : adv[i];
    adv[i] = !kMasked || mask[i] ? clamp(y, image.lo, image.hi) : x[i];
  }
  return bad;
}

// target_clones does not reach through templates, hence one plain function per case.
#define FASTADV_WALK(NAME, TYPE, MASKED) \
  FASTADV_CLONES bool NAME(const Image& image) { return walk<TYPE, MASKED>(image); }
FASTADV_WALK(walk_float, Float, false)
FASTADV_WALK(walk_float_masked, Float, true)
FASTADV_WALK(walk_bfloat16, BFloat16, false)
FASTADV_WALK(walk_bfloat16_masked, BFloat16, true)
FASTADV_WALK(walk_half, Half, false)
FASTADV_WALK(walk_half_masked, Half, true)
#undef FASTADV_WALK

void l2_step(const Tensor& adv, const Tensor& grad, const Tensor& x, const Tensor& step_size, const Tensor& eps,
             double lo, double hi, const std::optional<Tensor>& mask, const std::optional<Tensor>& nonfinite) {
  const Step step = checked("l2_step", adv, grad, x, step_size, eps, lo, hi, mask, nonfinite);
  const bool masked = step.mask != nullptr;
  const auto walk = step.grad_type == ScalarType::Float      ? (masked ? walk_float_masked : walk_float)
                    : step.grad_type == ScalarType::BFloat16 ? (masked ? walk_bfloat16_masked : walk_bfloat16)
                                                             : (masked ? walk_half_masked : walk_half);
  const int64_t grad_bytes = step.grad_type == ScalarType::Float ? 4 : 2;
  torch::stable::parallel_for(0, step.pixels ? step.images : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const int64_t start = image * step.pixels;
      const Image work{step.adv + start,
                       static_cast<const char*>(step.grad) + start * grad_bytes,
                       step.x + start,
                       masked ? step.mask + start : nullptr,
                       step.pixels,
                       step.step_of(image),
                       step.eps_of(image),
                       step.lo,
                       step.hi};
      if (walk(work)) step.flag(image);
    }
  });
}

}  // namespace
}  // namespace fastadv

STABLE_TORCH_LIBRARY_FRAGMENT(fastadv, m) {
  m.def(
      "l2_step(Tensor(a!) adv, Tensor grad, Tensor x, Tensor step_size, Tensor eps, float lo, float hi, "
      "Tensor? mask=None, Tensor(b!)? nonfinite=None) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastadv, CPU, m) { m.impl("l2_step", TORCH_BOX(&fastadv::l2_step)); }
