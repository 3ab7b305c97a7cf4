// One call of window attention, as every instruction set's body sees it: what is given, and where a window's pixels lie.
#pragma once

#include "step.h"

namespace fastadv {
namespace {

constexpr float kLog2e = 1.44269504088896341f;

template <class T>
FASTADV_INLINE typename T::Bits narrow(float value);

template <>
FASTADV_INLINE uint32_t narrow<Float>(float value) {
  return std::bit_cast<uint32_t>(value);
}

// Both round to nearest, halves to even.
template <>
FASTADV_INLINE uint16_t narrow<BFloat16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), odd = bits >> 16 & 1;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t((bits + 0x7fff + odd) >> 16);
}

template <>
FASTADV_INLINE uint16_t narrow<Half>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff, odd = magnitude >> 13 & 1;
  const uint32_t normal = (magnitude + 0xc8000fff + odd) >> 13;
  // Adding one half leaves a multiple of 2^-24 in the lowest bits, rounded by the addition.
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t finite = magnitude < 0x38800000 ? small : normal;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  return uint16_t((magnitude >= 0x47800000 ? special : finite) | bits >> 16 & 0x8000);
}

// Floats from one row of a tile to the next, and the most rows: the largest window has 64 tokens, the largest head 64
// channels. One number for all sizes keeps the addresses in the inner loops constant without a copy of them per size.
constexpr int kRow = 64;

// The bias of a head is laid out in lines, one for each column x of keys: for every offset of rows, and in it for every
// column of queries, the bias between the two. The biases of one key to all queries, row after row, are then one piece
// of its line, which begins at start[key]. That is a fourth of a bias for each pair, and needs no index. Behind each
// line are zeros, for what is read to fill a register. start[key] counts from the head's first line.
struct Layout {
  int64_t window, line;
  int start[kRow];

  explicit Layout(int64_t window) : window(window), line((window * (window - 1) + kRow + 15) / 16 * 16) {
    for (int key = 0; key < window * window; ++key)
      start[key] = static_cast<int>(key % window * line + (window - 1 - key / window) * window);
  }

  int64_t size() const { return window * line; }

  // Calls f(place in the lines, row in the table) for pieces as long as the window that lie together in both.
  template <class F>
  void pieces(F f) const {
    const int64_t offsets = 2 * window - 1;
    for (int64_t x = 0; x < window; ++x) {
      for (int64_t y = 0; y < offsets; ++y) f(x * line + y * window, y * offsets + window - 1 - x);
    }
  }
};

// A call's arguments, as the loops need them. grad: of the backward pass. bias: laid out, times log2(e).
struct Call {
  ScalarType type;
  const void *qkv, *grad;
  void* out;
  const float* bias;
  Layout layout;
  int64_t height, width, heads, dim, window, shift_h, shift_w;
  float scale;
};

// Where the tokens of a window lie in the map before it is rolled, and in which of its regions each one is.
struct Place {
  int64_t pixels[kRow];
  int regions[kRow];
  bool edge;

  void find(const Call& call, int64_t number) {
    const int64_t window = call.window, across = call.width / window, down = call.height / window;
    const int64_t column = number % across, row = number / across % down, image = number / across / down;
    // Only here do opposite sides of the map meet.
    const bool bottom = call.shift_h && row == down - 1, right = call.shift_w && column == across - 1;
    edge = bottom || right;
    int i = 0;
    for (int64_t y = row * window + call.shift_h; y < (row + 1) * window + call.shift_h; ++y) {
      const bool below = y >= call.height;
      const int64_t start = (image * call.height + y - (below ? call.height : 0)) * call.width;
      for (int64_t x = column * window + call.shift_w; x < (column + 1) * window + call.shift_w; ++x, ++i) {
        const bool beyond = x >= call.width;
        pixels[i] = start + x - (beyond ? call.width : 0);
        regions[i] = 2 * below + beyond;
      }
    }
  }
};

}  // namespace
}  // namespace fastadv
