// A tile of rows, its labels and its numbers, which the two walks over logits have in common.
#pragma once

#include "rows.h"

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {
namespace {

template <class T, T v>
struct Constant {
  static constexpr T value = v;
};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// The numbers of each row that the forward walk finds.
template <class L>
struct Tile {
  using T = typename L::Scalar;
  T max[kTileRows], target_logit[kTileRows], margin[kTileRows], sumexp_others[kTileRows];
  T weighted_logits[kTileRows], weight_total[kTileRows];  // sum_k weight_k (a_k - max) and sum_k weight_k
  typename L::Int label[kTileRows];                       // -1 with soft targets
  bool valid[kTileRows];
};

// The four numbers of each row that its gradient depends on (math/losses.h RowGradient).
template <class T>
struct GradientNumbers {
  T max, scale, at_label, smoothing_coef;
};
template <class T>
struct GradientTile {
  T max[kTileRows], scale[kTileRows], at_label[kTileRows], smoothing_coef[kTileRows];

  ABSGD_FN GradientNumbers<T> row(int j) const { return {max[j], scale[j], at_label[j], smoothing_coef[j]}; }
};

// The class vectors of an adjusted row (math/losses.h Row): a_k = S_k x_k + D_k, and M_y less at the label.
template <class T>
struct Adjust {
  const T *s, *d, *m;

  static Adjust of(const LogitInput& a) {
    const T* s = static_cast<const T*>(a.adjust);
    return {s, s + a.classes, s + 2 * a.classes};
  }
};

// The class vectors S and D in the order in which Lanes::load_even_odd puts the classes into registers: of each pair of
// registers the N even classes, and then the N odd ones. The last two pairs of a row may overlap their neighbours, so
// they stand once more behind the others. They are written once per call: in their natural order, bf16 logits would
// have to change their lanes instead.
template <class L>
struct PairedVectors {
  using T = typename L::Scalar;
  static constexpr int kPair = 2 * L::N;

  // Where the pair that begins at class `first` stands.
  static ABSGD_FN int64_t place(int64_t first, int64_t classes) {
    return first % kPair == 0 ? first : classes / kPair * kPair + 2 * kPair - (classes - first);
  }
  static int64_t size(int64_t classes) { return classes / kPair * kPair + 2 * kPair; }
  static int64_t bytes(int64_t classes) { return 2 * size(classes) * int64_t(sizeof(T)); }
  static Adjust<T> of(const LogitArgs& a) {
    const T* const s = static_cast<const T*>(a.paired);
    return {s, s == nullptr ? s : s + size(a.classes), nullptr};
  }
  static void write(const LogitArgs& a) {
    const Adjust<T> from = Adjust<T>::of(a);
    T* to = static_cast<T*>(a.paired);
    const T* const vectors[] = {from.s, from.d};
    for (const T* const vector : vectors) {
      auto pair = [&](int64_t first) {
        T* const out = to + place(first, a.classes);
        for (int j = 0; j < L::N; ++j) out[j] = vector[first + 2 * j], out[L::N + j] = vector[first + 2 * j + 1];
      };
      for (int64_t first = 0; first + kPair <= a.classes; first += kPair) pair(first);
      if (a.classes >= 2 * kPair) pair(a.classes - 2 * kPair);
      pair(a.classes - kPair);
      to += size(a.classes);
    }
  }
};

// The weights of the classes beside the label (launch.h ClassWeights), a constant of the compiled loops. `none`: the
// label alone has a term. `equal`: label smoothing without class weights. `weighted`: class weights or soft targets.
enum class OtherClasses { none, equal, weighted };

// Calls f with a constant of type OtherClasses.
template <class F>
ABSGD_FN void for_other_classes(const LogitArgs& a, F f) {
  if (!a.all_classes_weigh()) return f(Constant<OtherClasses, OtherClasses::none>{});
  if (a.soft == nullptr && a.class_weight == nullptr) return f(Constant<OtherClasses, OtherClasses::equal>{});
  f(Constant<OtherClasses, OtherClasses::weighted>{});
}

// Reads the labels of rows [first, first + count). Returns the first row whose label is out of range, or
// kAllLabelsInRange.
template <class L>
int64_t read_labels(const LogitArgs& a, int64_t first, int count, Tile<L>& t) {
  int64_t out_of_range = kAllLabelsInRange;
  for (int j = 0; j < kTileRows; ++j) {
    t.label[j] = 0;
    t.valid[j] = false;
    if (j >= count) continue;
    const int64_t i = first + j;
    if (a.soft != nullptr) {
      t.label[j] = -1;
      t.valid[j] = a.mask == nullptr || a.mask[i] != 0;
      continue;
    }
    const int64_t y =
        a.target_int64 ? static_cast<const int64_t*>(a.target)[i] : static_cast<const int32_t*>(a.target)[i];
    if (y == a.ignore_index) continue;
    if (y < 0 || y >= a.classes) {
      out_of_range = smaller(out_of_range, i);
      continue;
    }
    t.label[j] = typename L::Int(y);
    t.valid[j] = a.mask == nullptr || a.mask[i] != 0;
  }
  return out_of_range;
}

// The logits and the class vectors of the current tile. S: the type that logits are stored in. kForm:
// LogitArgs::adjust_form.
template <class LaneType, class S, int kForm>
struct TileInput {
  using L = LaneType;
  using T = typename L::Scalar;
  static constexpr bool kAdjusted = kForm != 0;
  const LogitArgs& a;
  const ClassWeights<T> weights;
  const Adjust<T> adjust, paired;
  int64_t tile = 0, first = 0;  // first: the tile's first row
  int count = 0;                // rows of the tile
  RowPointers<const S> rows;

  explicit TileInput(const LogitArgs& args)
      : a(args), weights(ClassWeights<T>::of(args)), adjust(Adjust<T>::of(args)), paired(PairedVectors<L>::of(args)) {}

  // Makes tile `index` the current one, and reads its labels (read_labels).
  ABSGD_FN int64_t move_to(int64_t index, Tile<L>& t) {
    tile = index;
    first = tile * kTileRows;
    count = int(smaller(kTileRows, a.rows() - first));
    const int64_t out_of_range = read_labels<L>(a, first, count, t);
    rows = row_pointers(static_cast<const S*>(a.logits), a, a.stride_batch, a.stride_class, a.stride_inner, first);
    return out_of_range;
  }
  // Reads the margin and the adjusted logit of each label. The other numbers of the tile become 0.
  ABSGD_FN void read_targets(Tile<L>& t) const {
    for (int j = 0; j < kTileRows; ++j) {
      const int64_t y = t.label[j];
      const bool there = y >= 0 && a.classes > 0;
      t.margin[j] = kAdjusted && there ? adjust.m[y] : T(0);
      t.target_logit[j] = there ? to_real<L>(*rows.at(j, y)) : T(0);
      if (kAdjusted && there) t.target_logit[j] = adjust.s[y] * t.target_logit[j] + adjust.d[y] - t.margin[j];
      t.max[j] = t.sumexp_others[j] = t.weighted_logits[j] = t.weight_total[j] = 0;
    }
  }
  // The largest adjusted logit of row j. `max` is that of all classes, but of all classes except the label in an
  // adjusted row.
  ABSGD_FN T whole_max(T max, const Tile<L>& t, int j) const {
    return kAdjusted && t.label[j] >= 0 && t.target_logit[j] > max ? t.target_logit[j] : max;
  }
};

}  // namespace
}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
