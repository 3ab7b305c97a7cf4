#include "step.h"

namespace fastadv {
namespace {

// Axes of length 1 may carry any stride.
bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t axis = 0; axis < a.dim(); ++axis) {
    if (a.size(axis) != b.size(axis) || (a.size(axis) > 1 && a.stride(axis) != b.stride(axis))) return false;
  }
  return true;
}

// Each image fills one block of memory, in any order of its axes, and the blocks follow one another.
bool image_after_image(const Tensor& t, int64_t pixels) {
  if (t.size(0) > 1 && t.stride(0) != pixels) return false;
  int64_t filled = 1;
  for (int64_t pass = 1; pass < t.dim(); ++pass) {
    for (int64_t axis = 1; axis < t.dim(); ++axis) {
      if (t.size(axis) > 1 && t.stride(axis) == filled) filled *= t.size(axis);
    }
  }
  return filled == pixels;
}

void check_per_image(const char* op, const char* name, const Tensor& t, int64_t images) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous(), op, ": ", name,
                  " must be a contiguous float32 CPU tensor");
  STD_TORCH_CHECK(t.numel() == 1 || t.numel() == images, op, ": ", name, " has ", t.numel(), " values for ", images,
                  " images; give one, or one per image");
}

}  // namespace

Step checked(const char* op, const Tensor& adv, const Tensor& grad, const Tensor& x, const Tensor& step_size,
             const Tensor& eps, double lo, double hi, const std::optional<Tensor>& mask,
             const std::optional<Tensor>& nonfinite) {
  STD_TORCH_CHECK(adv.dim() >= 2, op, ": adv must have a batch axis and at least one more");
  const int64_t images = adv.size(0), pixels = images ? adv.numel() / images : 0;
  STD_TORCH_CHECK(adv.scalar_type() == ScalarType::Float && x.scalar_type() == ScalarType::Float, op,
                  ": adv and x must be float32");
  const ScalarType grad_type = grad.scalar_type();
  STD_TORCH_CHECK(
      grad_type == ScalarType::Float || grad_type == ScalarType::BFloat16 || grad_type == ScalarType::Half, op,
      ": grad must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(same_layout(adv, x) && same_layout(adv, grad), op,
                  ": adv, grad and x must have the same shape and strides");
  STD_TORCH_CHECK(adv.numel() == 0 || image_after_image(adv, pixels), op,
                  ": adv must be dense in memory, image after image; use adv.contiguous()");
  STD_TORCH_CHECK(adv.numel() == 0 || adv.const_data_ptr() != x.const_data_ptr(), op,
                  ": adv and x are the same memory; start from x.clone()");
  check_per_image(op, "step_size", step_size, images);
  check_per_image(op, "eps", eps, images);
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && same_layout(adv, *mask), op,
                    ": mask must be bool with the shape and strides of adv");
  }
  if (nonfinite) {
    STD_TORCH_CHECK(nonfinite->scalar_type() == ScalarType::Int && nonfinite->is_contiguous() &&
                        nonfinite->dim() == 1 && nonfinite->numel() == images,
                    op, ": nonfinite must be a contiguous int32 tensor with one value per image");
  }
  return Step{
      .images = images,
      .pixels = pixels,
      .adv = static_cast<float*>(adv.mutable_data_ptr()),
      .grad = grad.const_data_ptr(),
      .grad_type = grad_type,
      .x = static_cast<const float*>(x.const_data_ptr()),
      .step_size = static_cast<const float*>(step_size.const_data_ptr()),
      .eps = static_cast<const float*>(eps.const_data_ptr()),
      .step_stride = step_size.numel() == 1 ? 0 : 1,
      .eps_stride = eps.numel() == 1 ? 0 : 1,
      .lo = static_cast<float>(lo),
      .hi = static_cast<float>(hi),
      .mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
      .nonfinite = nonfinite ? static_cast<int32_t*>(nonfinite->mutable_data_ptr()) : nullptr,
  };
}

}  // namespace fastadv
