// The bits of an operator's `flags`. absgd_fast/_codes.py has the same numbers, which a test compares.
#pragma once

#include <stdint.h>

namespace {

enum Flags : int64_t { kNormalizer = 3, kInitFirst = 4, kUpdate = 8, kWithGrad = 16, kWithStats = 32, kPrune = 64 };
constexpr int kKindShift = 8;  // the bits from here on hold a math/losses.h Kind

}  // namespace
