// fastadv::window_attention and its backward on the CPU: roll, partition, bias, mask, softmax and reverse in one pass.
//
// Unlike the attack steps nothing here is exact, so products and sums may fuse (fastadv/build.py). Nothing is reordered
// all the same: each (window, head) is one thread's work, written out in lanes, and gives the same bits in any company.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <iterator>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "window_call.h"

// Not into its caller, and in one version, whatever the arguments: it is there once per instruction set already.
#if defined(__GNUC__) && !defined(__clang__)
#define FASTADV_APART __attribute__((noinline, noclone))
#else
#define FASTADV_APART __attribute__((noinline))
#endif

// The lanes are part of the code, which target_clones cannot vary. Only g++ knows the pragma.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define FASTADV_ISA v4
#define FASTADV_LANES 16
#include "window_worker.h"
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define FASTADV_ISA v3
#define FASTADV_LANES 8
#include "window_worker.h"
#pragma GCC pop_options
#endif
#define FASTADV_ISA plain
#define FASTADV_LANES 4
#include "window_worker.h"

namespace fastadv {
namespace {

struct Body {
  void (*forward)(const Call&, int64_t begin, int64_t end);
  void (*backward)(const Call&, int64_t begin, int64_t end, float* bias_grad);
};

Body best() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("x86-64-v4")) return {v4::forward, v4::backward};
  if (__builtin_cpu_supports("x86-64-v3")) return {v3::forward, v3::backward};
#endif
  return {plain::forward, plain::backward};
}

template <class T>
void widen(const Tensor& from, std::vector<float>& to) {
  const auto* const bits = static_cast<const typename T::Bits*>(from.const_data_ptr());
  for (size_t i = 0; i < to.size(); ++i) to[i] = T::widen(bits[i]);
}

bool known(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

// One block of 64 bytes, so that vectors of it are aligned as the registers want it.
struct alignas(64) Line {
  float values[16];
};

Call checked(const char* op, const Tensor& qkv, const Tensor& table, int64_t heads, int64_t window, int64_t shift_h,
             int64_t shift_w, double scale) {
  const ScalarType type = qkv.scalar_type();
  STD_TORCH_CHECK(qkv.is_cpu() && qkv.dim() == 4 && qkv.is_contiguous() && known(type), op,
                  ": qkv must be a contiguous (B, H, W, 3 * heads * D) CPU tensor, float32, bfloat16 or float16");
  const int64_t height = qkv.size(1), width = qkv.size(2), channels = qkv.size(3);
  STD_TORCH_CHECK(heads > 0 && channels % (3 * heads) == 0, op, ": ", channels, " channels are not 3 * ", heads,
                  " heads * D");
  const int64_t dim = channels / 3 / heads;
  STD_TORCH_CHECK((window == 4 || window == 7 || window == 8) && (dim == 16 || dim == 32 || dim == 64), op,
                  ": window ", window, " with head dimension ", dim,
                  " is not served; windows are 4, 7, 8, head dimensions 16, 32, 64");
  STD_TORCH_CHECK(height % window == 0 && width % window == 0, op, ": a map of ", height, " x ", width,
                  " does not divide into windows of ", window);
  STD_TORCH_CHECK(0 <= shift_h && shift_h < window && 0 <= shift_w && shift_w < window, op, ": shifts ", shift_h,
                  " and ", shift_w, " must be below the window, ", window);
  const int64_t entries = (2 * window - 1) * (2 * window - 1);
  STD_TORCH_CHECK(table.is_cpu() && table.dim() == 2 && table.is_contiguous() && table.size(0) == entries &&
                      table.size(1) == heads &&
                      (table.scalar_type() == ScalarType::Float || table.scalar_type() == type),
                  op, ": table must be a contiguous (", entries, ", ", heads, ") CPU tensor, float32 or as qkv");
  return Call{.type = type,
              .qkv = qkv.const_data_ptr(),
              .grad = nullptr,
              .out = nullptr,
              .bias = nullptr,
              .layout = Layout(window),
              .height = height,
              .width = width,
              .heads = heads,
              .dim = dim,
              .window = window,
              .shift_h = shift_h,
              .shift_w = shift_w,
              .scale = static_cast<float>(scale)};
}

// A call with all it points to, and how its work is cut.
struct Job {
  Call call;
  Body body = best();
  int64_t windows, grain;
  std::vector<Line> bias;

  Job(const Call& call, const Tensor& table, int64_t images) : call(call) {
    std::vector<float> entries(table.numel());
    if (table.scalar_type() == ScalarType::Float) widen<Float>(table, entries);
    if (table.scalar_type() == ScalarType::BFloat16) widen<BFloat16>(table, entries);
    if (table.scalar_type() == ScalarType::Half) widen<Half>(table, entries);
    const Layout& layout = call.layout;
    bias.resize(call.heads * layout.size() / 16);
    for (int64_t head = 0; head < call.heads; ++head) {
      float* const to = bias.front().values + head * layout.size();
      layout.pieces([&](int64_t place, int64_t entry) {
        for (int64_t i = 0; i < layout.window; ++i) to[place + i] = entries[(entry + i) * call.heads + head] * kLog2e;
      });
    }
    this->call.bias = bias.front().values;
    const int64_t tokens = call.window * call.window;
    windows = images * (call.height * call.width / tokens);
    // Windows that are handed to a thread at a time: some 2^20 products, 30 us.
    grain = std::max<int64_t>(1, (1 << 20) / (2 * tokens * tokens * call.dim * call.heads));
  }
};

Tensor window_attention(const Tensor& qkv, const Tensor& table, int64_t heads, int64_t window, int64_t shift_h,
                        int64_t shift_w, double scale) {
  Job job(checked("window_attention", qkv, table, heads, window, shift_h, shift_w, scale), table, qkv.size(0));
  Tensor out = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3});
  job.call.out = out.mutable_data_ptr();
  torch::stable::parallel_for(0, job.windows, job.grain,
                              [&](int64_t begin, int64_t end) { job.body.forward(job.call, begin, end); });
  return out;
}

// The table's gradient is summed in parts, at most kParts of at least kRun windows each, whatever the number of
// threads, and then over the parts in their order. A run of windows is added up in float32, the runs in float64.
constexpr int64_t kParts = 64, kRun = 32;

Tensor backward_with_table(const Job& job, const Tensor& table) {
  const Layout& layout = job.call.layout;
  const int64_t entries = table.numel(), heads = job.call.heads, size = layout.size();
  const int64_t length = std::max(kRun, (job.windows + kParts - 1) / kParts);
  const int64_t parts = (job.windows + length - 1) / length;
  std::vector<double> sums(parts * entries);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    std::vector<Line> scratch(heads * size / 16);
    float* const lines = scratch.front().values;
    for (int64_t part = first; part < last; ++part) {
      double* const sum = sums.data() + part * entries;
      const int64_t stop = std::min(job.windows, (part + 1) * length);
      for (int64_t begin = part * length; begin < stop; begin += kRun) {
        std::fill_n(lines, heads * size, 0.f);
        job.body.backward(job.call, begin, std::min(stop, begin + kRun), lines);
        for (int64_t head = 0; head < heads; ++head) {
          const float* const from = lines + head * size;
          layout.pieces([&](int64_t place, int64_t entry) {
            for (int64_t i = 0; i < layout.window; ++i) sum[(entry + i) * heads + head] += from[place + i];
          });
        }
      }
    }
  });
  Tensor grad = torch::stable::new_empty(table, {table.size(0), table.size(1)}, ScalarType::Float);
  float* const to = static_cast<float*>(grad.mutable_data_ptr());
  for (int64_t i = 0; i < entries; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[part * entries + i];
    to[i] = static_cast<float>(sum);
  }
  return grad;
}

std::tuple<Tensor, Tensor> window_attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& table,
                                                     int64_t heads, int64_t window, int64_t shift_h, int64_t shift_w,
                                                     double scale, bool table_learns) {
  const char* const op = "window_attention_backward";
  Job job(checked(op, qkv, table, heads, window, shift_h, shift_w, scale), table, qkv.size(0));
  STD_TORCH_CHECK(grad.is_cpu() && grad.is_contiguous() && grad.scalar_type() == qkv.scalar_type() &&
                      grad.dim() == 4 && grad.size(0) == qkv.size(0) && grad.size(1) == qkv.size(1) &&
                      grad.size(2) == qkv.size(2) && 3 * grad.size(3) == qkv.size(3),
                  op, ": grad must be a contiguous (B, H, W, heads * D) CPU tensor with qkv's type");
  Tensor qkv_grad = torch::stable::empty_like(qkv);
  job.call.grad = grad.const_data_ptr();
  job.call.out = qkv_grad.mutable_data_ptr();
  if (table_learns) {
    Tensor table_grad = backward_with_table(job, table);
    return {qkv_grad, table_grad};
  }
  torch::stable::parallel_for(0, job.windows, job.grain,
                              [&](int64_t begin, int64_t end) { job.body.backward(job.call, begin, end, nullptr); });
  return {qkv_grad, torch::stable::new_empty(table, {0}, ScalarType::Float)};
}

}  // namespace
}  // namespace fastadv

STABLE_TORCH_LIBRARY_FRAGMENT(fastadv, m) {
  m.def(
      "window_attention(Tensor qkv, Tensor table, int heads, int window, int shift_h, int shift_w, float scale) "
      "-> Tensor");
  m.def(
      "window_attention_backward(Tensor grad, Tensor qkv, Tensor table, int heads, int window, int shift_h, "
      "int shift_w, float scale, bool table_learns) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&fastadv::window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&fastadv::window_attention_backward));
}
