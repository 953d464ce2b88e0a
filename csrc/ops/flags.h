// The bits of an operator's `flags`; Python has the same table, and a test compares the two.
#pragma once

#include <stdint.h>

namespace {

enum Flags : int64_t { kNormalizer = 3, kInitFirst = 4, kUpdate = 8, kWithGrad = 16, kWithStats = 32, kPrune = 64 };
constexpr int kKindShift = 8;  // the bits above: math/losses.h Kind

}  // namespace
