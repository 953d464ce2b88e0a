// The sums of squares of gradients, for clipping by the global norm (MATH §3.6). The kernel adds in double, because the
// gradients of a deferred step are not normalised yet, and the squares of such sums may leave the range of float.
// This file is compiled once for each instruction set.
#include "kernels.h"
#include "lanes.h"

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {
namespace {

using Wide = Lanes<double>;

// Squares of the numbers in one register, added to Wide::V sums.
struct Squares {
  Wide::V sums[2] = {};

  ABSGD_FN void add(Wide::V x, int place) { sums[place] += x * x; }
  ABSGD_FN void add(Lanes<double>::V x) { add(x, 0); }
  // A register of floats is two of doubles.
  ABSGD_FN void add(Lanes<float>::V x) {
    typedef float Half __attribute__((vector_size(sizeof(x) / 2)));
    Half half[2];
    __builtin_memcpy(half, &x, sizeof(x));
    for (int j = 0; j < 2; ++j) add(__builtin_convertvector(half[j], Wide::V), j);
  }
  ABSGD_FN double total() const { return Wide::sum(sums[0] + sums[1]); }
};

template <class S, class T>
double sum_of_squares(const S* x, int64_t count) {
  using L = Lanes<T>;
  using One = Lanes<T, sizeof(T)>;
  Squares even, odd;  // two chains of additions, so that one does not wait for the other
  int64_t i = 0;
  for (; i + 2 * L::N <= count; i += 2 * L::N) {
    even.add(L::load(x + i));
    odd.add(L::load(x + i + L::N));
  }
  double rest = 0;
  for (; i < count; ++i) {
    const double one = One::load(x + i)[0];
    rest += one * one;
  }
  return even.total() + odd.total() + rest;
}

}  // namespace

void squares(const SquaresBlock* blocks, double* sums, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    const SquaresBlock& block = blocks[j];
    for_storage(block.dtype, [&](auto stored, auto real) {
      using S = typename decltype(stored)::type;
      sums[j] = sum_of_squares<S, typename decltype(real)::type>(static_cast<const S*>(block.data), block.count);
    });
  }
}

}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
