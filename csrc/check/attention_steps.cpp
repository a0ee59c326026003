// Time of the three steps of the attention forward on operands in L1, the figures of csrc/README.md: `make bench-steps`.
// Built with all x86 flags; prints what the machine runs.
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <vector>

#include "../common/dot_amx.h"
#include "../common/isa.h"
#include "../cpu/ragged_attention.h"

using namespace xtg;

namespace {

// Nanoseconds of CPU time a call: the least of several, for the machine may be busy.
template <class F>
double least(F f) {
  constexpr int kCalls = 200;
  double best = 1e30;
  for (int round = 0; round < 15; ++round) {
    timespec start, end;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &start);
    for (int i = 0; i < kCalls; ++i) f();
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
    const double ns = double(end.tv_sec - start.tv_sec) * 1e9 + double(end.tv_nsec - start.tv_nsec);
    if (ns / kCalls < best) best = ns / kCalls;
  }
  return best;
}

template <class V, class T>
void time_steps(const char* name) {
  using Tile = AttentionTile<V, T>;
  using Dot = typename Tile::Dot;
  constexpr int64_t rows = Tile::rows, keys = Tile::key_block, dim = 64, steps = dim / Dot::group;
  AttentionArgs args{};
  args.head_dim = dim;
  std::vector<char> buffer(attention_scratch<V, T>(args) + 64);
  char* base = buffer.data() + (64 - reinterpret_cast<uintptr_t>(buffer.data()) % 64) % 64;
  const AttentionScratch<V, T> s(args, base);
  std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  std::vector<T> x(size_t(keys * dim));
  for (T& value : x) from_float(normal(generator), &value);
  pack_left(Dot{}, x.data(), dim, rows, dim, s.left_a, steps);
  pack_right_transposed(Dot{}, x.data(), dim, keys, dim, steps, s.right_a, keys);
  pack_right(Dot{}, x.data(), dim, keys, keys, dim, s.right_c, dim);

  const typename Dot::Session session;
  (void)session;
  const double scores = least([&] {
    product<V, Dot>(rows, keys, steps, s.left_a, steps, s.right_a, keys, s.scores, keys, false);
  });
  const double softmax = least([&] {
    softmax_rows<V, Dot, std::is_same_v<T, float>, false>(s.scores, keys, rows, std::integral_constant<int64_t, keys>{},
                                                          keys, 0.18f, false, s.row_max, s.row_sum, s.factors, s.probs,
                                                          keys / Dot::group);
  });
  const double sums = least([&] {
    product<V, Dot>(rows, dim, keys / Dot::group, s.probs, keys / Dot::group, s.right_c, dim, s.acc_a, dim, true);
  });
  const double per16 = double(rows * keys) / 16;
  std::printf("%-16s %2d x %3d  ns for 16 scores: scores %5.2f  softmax %5.2f  sums %5.2f   %4.0f GFLOP/s\n", name,
              int(rows), int(keys), scores / per16, softmax / per16, sums / per16,
              4.0 * double(rows * keys * dim) / (scores + softmax + sums));
}

}  // namespace

int main() {
  for (const std::string& isa : available_isas()) {
    if (isa == "avx512") time_steps<VecAvx512, float>("avx512 float");
    if (isa == "avx512bf16") time_steps<VecAvx512Bf16, bf16>("avx512bf16 bf16");
    if (isa == "amx") time_steps<VecAmx, bf16>("amx bf16");
  }
}
