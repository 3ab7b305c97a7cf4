// One thread's share of window attention, for one instruction set; included once for each, as window_tile.h is.
#include "window_tile.h"

namespace fastadv {
namespace {
namespace FASTADV_ISA {

struct Copies {
  decltype(&gather<Float, 16>) in;
  decltype(&scatter<Float, 16>) out;
};

template <class T>
Copies copies_of(int64_t dim) {
  if (dim == 16) return {gather<T, 16>, scatter<T, 16>};
  if (dim == 32) return {gather<T, 32>, scatter<T, 32>};
  return {gather<T, 64>, scatter<T, 64>};
}

Copies copies_of(ScalarType type, int64_t dim) {
  if (type == ScalarType::Float) return copies_of<Float>(dim);
  return type == ScalarType::BFloat16 ? copies_of<BFloat16>(dim) : copies_of<Half>(dim);
}

// One thread's work: a window after the other, and in it a head after the other.
struct Worker {
  // Half a row longer than its rows, so that those of the tile behind it do not meet them in the same places of the
  // cache.
  struct Tile {
    alignas(64) float values[kRow * kRow + kRow / 2];
    operator float*() { return values; }
  };
  Tile q, k, v, grad, out, by_channel, scores, slopes;
  alignas(64) float hidden[4 * kRow], inverse[kRow], scale[kRow], one[kRow];
  Place places[2];
  const Call& call;
  const Copies copies;
  const int tokens, dim, columns;
  // Channels of all heads, and bytes of each.
  const int64_t width = call.heads * call.dim, bytes = call.type == ScalarType::Float ? 4 : 2;
  const Place *place = nullptr, *next = nullptr;

  explicit Worker(const Call& call)
      : call(call),
        copies(copies_of(call.type, call.dim)),
        tokens(static_cast<int>(call.window * call.window)),
        dim(static_cast<int>(call.dim)),
        columns((tokens + kLanes - 1) / kLanes * kLanes) {
    for (float* tile : {q.values, grad.values, out.values}) std::fill(tile + tokens * kRow, tile + columns * kRow, 0.f);
    std::fill(std::begin(scale), std::end(scale), call.scale);
    std::fill(std::begin(one), std::end(one), 1.f);
  }

  // Calls f(head) for every head of every window, `place` being the window's and `next` that of the one after it.
  template <class F>
  void each(int64_t begin, int64_t end, F f) {
    places[begin % 2].find(call, begin);
    for (int64_t window = begin; window < end; ++window) {
      place = &places[window % 2], next = &places[(window + 1) % 2];
      places[(window + 1) % 2].find(call, std::min(window + 1, end - 1));
      for (int region = 0; place->edge && region < 4; ++region) {
        for (int i = 0; i < columns; ++i)
          hidden[region * kRow + i] = i < tokens && place->regions[i] != region ? -100.f * kLog2e : 0.f;
      }
      for (int64_t head = 0; head < call.heads; ++head) f(head);
    }
  }

  // The rows of a head into a tile, and out of one. at: its first channel.
  void take(const void* map, int64_t stride, int64_t at, float* tile) const {
    copies.in(static_cast<const char*>(map) + at * bytes, *place, *next, tokens, stride, tile);
  }

  void give(float* tile, const float* factors, int64_t stride, int64_t at) const {
    copies.out(tile, factors, *place, *next, tokens, stride, static_cast<char*>(call.out) + at * bytes);
  }

  // Powers of the scores of every key and query, and 1 / their sums.
  void score(const float* queries, int64_t head) {
    transpose(queries, call.scale * kLog2e, columns, dim, by_channel);
    const float* const bias = call.bias + head * call.layout.size();
    multiply<true>(k, by_channel, tokens, dim, columns, scores, bias, call.layout.start);
    for (int key = 0; place->edge && key < tokens; ++key) {
      const float* const mask = hidden + place->regions[key] * kRow;
      float* const row = scores + key * kRow;
      for (int i = 0; i < columns; i += kLanes) store(row + i, load(row + i) + load(mask + i));
    }
    for (int i = 0; i < columns; i += kLanes) (tokens % 7 ? soften<8> : soften<7>)(scores + i, tokens, inverse + i);
  }

  void forward(int64_t begin, int64_t end) {
    each(begin, end, [&](int64_t head) {
      // The queries are not needed once they are transposed.
      take(call.qkv, 3 * width, head * dim, out);
      take(call.qkv, 3 * width, width + head * dim, k);
      score(out, head);
      take(call.qkv, 3 * width, 2 * width + head * dim, v);
      multiply<false>(scores, v, tokens, tokens, dim, out);
      give(out, inverse, width, head * dim);
    });
  }

  // bias_grad: as the bias, added to; or null.
  void backward(int64_t begin, int64_t end, float* bias_grad) {
    each(begin, end, [&](int64_t head) {
      take(call.qkv, 3 * width, head * dim, q);
      take(call.qkv, 3 * width, width + head * dim, k);
      score(q, head);
      take(call.qkv, 3 * width, 2 * width + head * dim, v);
      take(call.grad, width, head * dim, grad);
      transpose(grad, 1.f, columns, dim, by_channel);
      multiply<true>(v, by_channel, tokens, dim, columns, slopes);
      for (int i = 0; i < columns; i += kLanes)
        (tokens % 7 ? soften_back<8> : soften_back<7>)(scores + i, tokens, inverse + i, slopes + i);
      if (bias_grad) add_bias_grad(bias_grad + head * call.layout.size());
      multiply<false>(slopes, k, tokens, tokens, dim, out);
      give(out, scale, 3 * width, head * dim);
      multiply<true>(slopes, q, tokens, tokens, dim, out);
      give(out, scale, 3 * width, width + head * dim);
      multiply<true>(scores, grad, tokens, tokens, dim, out);
      give(out, one, 3 * width, 2 * width + head * dim);
    });
  }

  // Queries that are only padding have no gradient: what they add to the rest of the line is zero.
  void add_bias_grad(float* lines) {
    for (int key = 0; key < tokens; ++key) {
      for (int i = 0; i < columns; i += kLanes) {
        float* const sum = lines + call.layout.start[key] + i;
        store_loose(sum, load_loose(sum) + load(slopes + key * kRow + i));
      }
    }
  }
};

void forward(const Call& call, int64_t begin, int64_t end) {
  std::make_unique<Worker>(call)->forward(begin, end);
}

void backward(const Call& call, int64_t begin, int64_t end, float* bias_grad) {
  std::make_unique<Worker>(call)->backward(begin, end, bias_grad);
}

}  // namespace FASTADV_ISA
}  // namespace
}  // namespace fastadv
#undef FASTADV_ISA
#undef FASTADV_LANES
