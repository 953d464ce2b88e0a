// Every formula of the package, written once for CPU and GPU. docs/MATH.md lists the same formulas with their papers.
//     math/losses.h     losses on logits and their gradients (MATH §2, §8)
//     math/weights.h    robust weights and their normaliser (MATH §1, §5), rectified weights (MATH §4.5)
//     math/target.h     the lambda of TargetESS (MATH §1.7)
//     math/rules.h      the levels of CVaR and chi-squared DRO (MATH §4.3, §4.4)
//     math/step.h       optimizer steps (MATH §3)
#pragma once

#include "math/losses.h"
#include "math/rules.h"
#include "math/step.h"
#include "math/target.h"
#include "math/weights.h"
