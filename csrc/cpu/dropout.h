// dropout on a CPU: the algorithm, over raw pointers and one vector type V; no torch in here.
//
// The mask is a pure function of seed, place, the row's id and the channel: Philox4x32-7 (Salmon et al., SC 2011) with the
// seed as its key. A counter gives 8 channels 16 bits each. Counters of 128 channels are worked on in the lanes of V, and
// which bits a channel gets is such that neighbouring lanes serve neighbouring channels, whatever the width of V.
// The same words as in xtg_kernels/ops/dropout/reference.py and triton_kernel.py.
#pragma once

#include <type_traits>

#include "../common/kernels.h"

namespace xtg {

// Channels whose bits come from 16 neighbouring counters: channel 128 b + 64 half + 16 word + lane takes one half of a
// word of counter 16 b + lane.
constexpr int64_t kDropoutBlock = 128, kDropoutLanes = 16;

// The four words of Philox4x32-7 for the counters (group, place, row) of consecutive groups.
template <class V>
static inline void philox(uint32_t first_group, uint32_t place, uint64_t row, uint64_t seed, typename V::words (&c)[4]) {
  using words = typename V::words;
  constexpr uint32_t kFactor0 = 0xD2511F53u, kFactor1 = 0xCD9E8D57u, kStep0 = 0x9E3779B9u, kStep1 = 0xBB67AE85u;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  words high0, low0, high1, low1;
  // The lanes differ in the first word alone: half of the first two rounds is the same in all of them.
  const uint64_t row_product = uint64_t(kFactor1) * uint32_t(row);
  const uint32_t shared = uint32_t(row_product >> 32) ^ place ^ key0;
  V::mul_words(V::words_from(first_group), kFactor0, &high0, &low0);
  c[2] = V::xor_words(high0, V::set_words(uint32_t(row >> 32)), V::set_words(key1));
  c[3] = low0;
  key0 += kStep0;
  key1 += kStep1;
  const uint64_t shared_product = uint64_t(kFactor0) * shared;
  V::mul_words(c[2], kFactor1, &high1, &low1);
  c[0] = V::xor_words(high1, V::set_words(uint32_t(row_product)), V::set_words(key0));
  c[1] = low1;
  c[2] = V::xor_words(c[3], V::set_words(uint32_t(shared_product >> 32)), V::set_words(key1));
  c[3] = V::set_words(uint32_t(shared_product));
#pragma GCC unroll 8
  for (int round = 2; round < 7; ++round) {
    key0 += kStep0;
    key1 += kStep1;
    V::mul_words(c[0], kFactor0, &high0, &low0);
    V::mul_words(c[2], kFactor1, &high1, &low1);
    c[0] = V::xor_words(high1, c[1], V::set_words(key0));
    c[1] = low1;
    c[2] = V::xor_words(high0, c[3], V::set_words(key1));
    c[3] = low0;
  }
}

// Calls f(channel, count, keep) for each vector of a row, where keep(x) is x in the channels that are kept, else 0.
template <class V, class F>
static inline void for_each_kept(const DropoutArgs& args, int64_t row, F f) {
  const auto least = V::set_words(args.threshold << 16);
  const auto id = uint64_t(args.row_ids[row]);
  for (int64_t block = 0; block < args.dim; block += kDropoutBlock)
    for (int64_t lane = 0; lane < kDropoutLanes; lane += V::width) {
      typename V::words random[4];
      philox<V>(uint32_t(block / kDropoutBlock * kDropoutLanes + lane), args.place, id, args.seed, random);
#pragma GCC unroll 8
      for (int part = 0; part < 8; ++part) {
        const int64_t channel = block + part * kDropoutLanes + lane;
        const auto bits = part < 4 ? V::upper_half(random[part]) : random[part - 4];
        const auto keep = [&](typename V::reg x) { return V::keep_from(bits, least, x); };
        if (channel + V::width <= args.dim)
          f(channel, int64_t(V::width), keep);
        else if (channel < args.dim)
          f(channel, args.dim - channel, keep);
      }
    }
}

// The first n of a vector, n at most its width.
template <class V, class T>
static inline typename V::reg load_some(const T* p, int64_t n) {
  if (n == V::width) return V::load(p);
  T padded[V::width] = {};
  std::memcpy(padded, p, size_t(n) * sizeof(T));
  return V::load(padded);
}

template <class V, class T>
static inline void store_some(typename V::reg x, int64_t n, T* p) {
  if (n == V::width) return V::store(p, x);
  T padded[V::width];
  V::store(padded, x);
  std::memcpy(p, padded, size_t(n) * sizeof(T));
}

template <class V, class In, class Out>
void dropout_rows(const DropoutArgs& args, int64_t first, int64_t count) {
  const auto scale = V::set1(args.scale);
  for (int64_t row = first; row < first + count; ++row) {
    const In* x = static_cast<const In*>(args.x) + row * args.dim;
    Out* out = static_cast<Out*>(args.dst) + row * args.dim;
    if (args.kept) {
      const Out* kept = static_cast<const Out*>(args.kept) + row * args.dim;
      for (int64_t d = 0; d < args.dim; d += V::width) {
        const int64_t n = min_of<int64_t>(V::width, args.dim - d);
        const auto scaled = V::mul(load_some<V>(x + d, n), scale);
        store_some<V>(V::where_greater(load_some<V>(kept + d, n), V::zero(), scaled, V::zero()), n, out + d);
      }
    } else if (args.residual) {
      const Out* residual = static_cast<const Out*>(args.residual) + row * args.dim;
      for_each_kept<V>(args, row, [&](int64_t d, int64_t n, auto keep) {
        const auto dropped = keep(V::mul(load_some<V>(x + d, n), scale));
        store_some<V>(V::add(load_some<V>(residual + d, n), dropped), n, out + d);
      });
    } else if (args.relu) {
      for_each_kept<V>(args, row, [&](int64_t d, int64_t n, auto keep) {
        store_some<V>(keep(V::mul(V::max(V::zero(), load_some<V>(x + d, n)), scale)), n, out + d);
      });
    } else {
      for_each_kept<V>(args, row, [&](int64_t d, int64_t n, auto keep) {
        store_some<V>(keep(V::mul(load_some<V>(x + d, n), scale)), n, out + d);
      });
    }
  }
}

}  // namespace xtg
