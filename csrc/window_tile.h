// The steps of the attention of one head in one window, for one instruction set. window_worker.h includes this file once
// per instruction set, FASTADV_ISA being its namespace and FASTADV_LANES its floats per register: hence no include guard.
//
// Scores are kept transposed, one row per key, one lane per query: maximum and sum of the softmax run down the rows and
// no two lanes ever meet. Rows of scores are padded to whole registers, as if there were more queries, which are zero.
namespace fastadv {
namespace {
namespace FASTADV_ISA {

constexpr int kLanes = FASTADV_LANES;
using Vec = float __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
using Bits = int32_t __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
using Loose = float __attribute__((vector_size(kLanes * sizeof(float)), may_alias, aligned(sizeof(float))));

FASTADV_INLINE Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
FASTADV_INLINE void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
FASTADV_INLINE Vec load_loose(const float* from) { return *reinterpret_cast<const Loose*>(from); }
FASTADV_INLINE void store_loose(float* to, Vec value) { *reinterpret_cast<Loose*>(to) = value; }
FASTADV_INLINE Vec splat(float value) { return value - Vec{}; }

// The larger of two, the second where one is NaN, as the instruction has it. Of a comparison gcc makes two.
FASTADV_INLINE Vec larger(Vec first, Vec second) {
#if !defined(__x86_64__)
  return first > second ? first : second;
#elif FASTADV_LANES == 16
  return (Vec)_mm512_max_ps((__m512)first, (__m512)second);
#elif FASTADV_LANES == 8
  return (Vec)_mm256_max_ps((__m256)first, (__m256)second);
#else
  return (Vec)_mm_max_ps((__m128)first, (__m128)second);
#endif
}

// 2^x for x <= 0 to 1.1e-7, but never below 2^-100: a smaller weight is lost in a sum that holds a 1, and denormal
// numbers are slow. NaN stays NaN. The polynomial is the best of degree 5 on [-0.5, 0.5].
FASTADV_INLINE Vec exp2(Vec x) {
  const Vec inside = larger(splat(-100.f), x);
  // The sum has no bits below 1, so it is rounded to the nearest integer, which stands in its lowest bits.
  const Vec rounded = inside + splat(0x1.8p23f);
  const Vec part = inside - (rounded - splat(0x1.8p23f));
  Vec power = 1.32764677993e-3f * part + 9.67554124829e-3f;
  power = power * part + 5.55071328665e-2f;
  power = power * part + 2.40221197266e-1f;
  power = power * part + 6.93146967059e-1f;
  power = power * part + 1.f;
  return (Vec)((Bits)power + ((Bits)rounded << 23));
}

// out[r] = sum over k of left[r * kRowStep + k * kDepthStep] * right[k], for kDown rows and kAcross registers of each:
// 14 or 16 sums of AVX512's 32 registers, 7 or 8 of 16 elsewhere. With a bias, plus what begins at bias[start[r]].
template <int kDown, int kAcross, int kRowStep, int kDepthStep>
FASTADV_INLINE void multiply_block(const float* left, const float* right, int depth, float* out, const float* bias,
                                   const int* start) {
  Vec sum[kDown][kAcross];
#pragma GCC unroll 16
  for (int r = 0; r < kDown; ++r) {
#pragma GCC unroll 2
    for (int a = 0; a < kAcross; ++a) sum[r][a] = bias ? load_loose(bias + start[r] + a * kLanes) : Vec{};
  }
#pragma GCC unroll 2
  for (int k = 0; k < depth; ++k) {
    Vec value[kAcross];
#pragma GCC unroll 2
    for (int a = 0; a < kAcross; ++a) value[a] = load(right + k * kRow + a * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kDown; ++r) {
      const float factor = left[r * kRowStep + k * kDepthStep];
#pragma GCC unroll 2
      for (int a = 0; a < kAcross; ++a) sum[r][a] += factor * value[a];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kDown; ++r) {
#pragma GCC unroll 2
    for (int a = 0; a < kAcross; ++a) store(out + r * kRow + a * kLanes, sum[r][a]);
  }
}

// out (rows, columns) = left * right, of depth terms: kByRow as left lies, (rows, depth), otherwise left is transposed.
template <int kDown, int kAcross, bool kByRow>
FASTADV_APART void multiply_all(const float* left, const float* right, int rows, int depth, int columns,
                                float* out, const float* bias, const int* start) {
  constexpr int kRowStep = kByRow ? kRow : 1, kDepthStep = kByRow ? 1 : kRow;
  for (int column = 0; column < columns; column += kAcross * kLanes) {
    for (int row = 0; row < rows; row += kDown)
      multiply_block<kDown, kAcross, kRowStep, kDepthStep>(left + row * kRowStep, right + column, depth,
                                                           out + row * kRow + column,
                                                           bias ? bias + column : nullptr, start + row);
  }
}

template <bool kByRow>
FASTADV_INLINE void multiply(const float* left, const float* right, int rows, int depth, int columns,
                             float* out, const float* bias = nullptr, const int* start = nullptr) {
  const bool wide = kLanes == 16 && columns % 32 == 0;
  const auto all = rows % 7 == 0 ? (wide ? multiply_all<7, 2, kByRow> : multiply_all<7, 1, kByRow>)
                   : wide        ? multiply_all<8, 2, kByRow>
                                 : multiply_all<kLanes == 16 ? 16 : 8, 1, kByRow>;
  all(left, right, rows, depth, columns, out, bias, start);
}

// Exchanges the kStep-sized blocks off the diagonal of two rows.
template <int kStep, int... lane>
FASTADV_INLINE void exchange(Vec& upper, Vec& lower, std::integer_sequence<int, lane...>) {
  const Vec first = upper, second = lower;
  upper = __builtin_shufflevector(first, second, (lane & kStep ? kLanes + lane - kStep : lane)...);
  lower = __builtin_shufflevector(first, second, (lane & kStep ? kLanes + lane : lane + kStep)...);
}

// Of each 16 bytes of both, kStep floats at a time in turn: the first half into upper, the second into lower. One
// instruction each.
template <int kStep, int... lane>
FASTADV_INLINE void interleave(Vec& upper, Vec& lower, std::integer_sequence<int, lane...>) {
  constexpr auto source = [](int l, int half) {
    const int place = l % 4 / (2 * kStep) * kStep + l % kStep + half * 2;
    return l / 4 * 4 + place + (l % (2 * kStep) >= kStep ? kLanes : 0);
  };
  const Vec first = upper, second = lower;
  upper = __builtin_shufflevector(first, second, source(lane, 0)...);
  lower = __builtin_shufflevector(first, second, source(lane, 1)...);
}

// out (columns, rows) = factor * transposed tile (rows, columns), in blocks of kLanes x kLanes.
FASTADV_APART void transpose(const float* tile, float factor, int rows, int columns, float* out) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  for (int row = 0; row < rows; row += kLanes) {
    for (int column = 0; column < columns; column += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) block[r] = factor * load(tile + (row + r) * kRow + column);
#pragma GCC unroll 4
      for (int r = 0; r < kLanes; r += 4) {
        interleave<1>(block[r], block[r + 1], lanes);
        interleave<1>(block[r + 2], block[r + 3], lanes);
        interleave<2>(block[r], block[r + 2], lanes);
        interleave<2>(block[r + 1], block[r + 3], lanes);
        std::swap(block[r + 1], block[r + 2]);
      }
      if constexpr (kLanes >= 8) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r)
          if (!(r & 4)) exchange<4>(block[r], block[r + 4], lanes);
      }
      if constexpr (kLanes >= 16) {
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) exchange<8>(block[r], block[r + 8], lanes);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(out + (column + r) * kRow + row, block[r]);
    }
  }
}

// In one register's columns of rows, which are a multiple of kSide: scores := 2^(scores - maximum), inverse := 1 / sum.
// kSide rows go side by side, because the maximum and the sum of each wait for those before.
template <int kSide>
FASTADV_APART void soften(float* scores, int rows, float* inverse) {
  Vec most[kSide], sum[kSide];
#pragma GCC unroll 8
  for (int c = 0; c < kSide; ++c) most[c] = load(scores + c * kRow);
  for (int row = kSide; row < rows; row += kSide) {
#pragma GCC unroll 8
    for (int c = 0; c < kSide; ++c) most[c] = larger(load(scores + (row + c) * kRow), most[c]);
  }
#pragma GCC unroll 8
  for (int c = 1; c < kSide; ++c) most[0] = larger(most[c], most[0]);
#pragma GCC unroll 8
  for (int c = 0; c < kSide; ++c) sum[c] = Vec{};
  for (int row = 0; row < rows; row += kSide) {
#pragma GCC unroll 8
    for (int c = 0; c < kSide; ++c) {
      const Vec power = exp2(load(scores + (row + c) * kRow) - most[0]);
      store(scores + (row + c) * kRow, power);
      sum[c] += power;
    }
  }
#pragma GCC unroll 8
  for (int c = 1; c < kSide; ++c) sum[0] += sum[c];
  store(inverse, 1.f / sum[0]);
}

// Likewise: scores := probabilities = scores * inverse,
// slopes := probabilities * (slopes - sum of probabilities * slopes).
template <int kSide>
FASTADV_APART void soften_back(float* scores, int rows, const float* inverse, float* slopes) {
  const Vec scale = load(inverse);
  Vec sum[kSide];
#pragma GCC unroll 8
  for (int c = 0; c < kSide; ++c) sum[c] = Vec{};
  for (int row = 0; row < rows; row += kSide) {
#pragma GCC unroll 8
    for (int c = 0; c < kSide; ++c) {
      const Vec probability = load(scores + (row + c) * kRow) * scale;
      store(scores + (row + c) * kRow, probability);
      sum[c] += probability * load(slopes + (row + c) * kRow);
    }
  }
#pragma GCC unroll 8
  for (int c = 1; c < kSide; ++c) sum[0] += sum[c];
  for (int row = 0; row < rows; row += kSide) {
#pragma GCC unroll 8
    for (int c = 0; c < kSide; ++c) {
      float* const slope = slopes + (row + c) * kRow;
      store(slope, load(scores + (row + c) * kRow) * (load(slope) - sum[0]));
    }
  }
}

// Calls a row of a head into the cache. They lie too far apart for the processor to foresee: without this the whole
// takes a quarter longer at window 4.
template <int kDim, class T>
FASTADV_INLINE void foresee(const T* row) {
  for (int d = 0; d < kDim; d += 64 / sizeof(T)) __builtin_prefetch(row + d, 0, 2);
}

// tile := the rows of a head, as float32; those of the next window are called for meanwhile.
template <class T, int kDim>
FASTADV_APART void gather(const void* map, const Place& place, const Place& next, int tokens, int64_t stride,
                          float* tile) {
  const auto* const base = static_cast<const typename T::Bits*>(map);
  for (int i = 0; i < tokens; ++i) {
    const auto* const from = base + place.pixels[i] * stride;
    foresee<kDim>(base + next.pixels[i] * stride);
    for (int d = 0; d < kDim; ++d) tile[i * kRow + d] = T::widen(from[d]);
  }
}

// The rows of a head := factors[row] * tile.
template <class T, int kDim>
FASTADV_APART void scatter(const float* tile, const float* factors, const Place& place, const Place& next, int tokens,
                           int64_t stride, void* map) {
  auto* const base = static_cast<typename T::Bits*>(map);
  for (int i = 0; i < tokens; ++i) {
    auto* const to = base + place.pixels[i] * stride;
    foresee<kDim>(base + next.pixels[i] * stride);
    for (int d = 0; d < kDim; ++d) to[d] = narrow<T>(tile[i * kRow + d] * factors[i]);
  }
}

}  // namespace FASTADV_ISA
}  // namespace
}  // namespace fastadv
