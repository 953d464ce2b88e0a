// Every formula of the package, once. math/losses.h has the losses, math/weights.h the robust and the rectified
// weights, math/rules.h the levels of CVaR and chi-squared DRO, math/step.h the optimizers.
#pragma once

#include "math/losses.h"
#include "math/rules.h"
#include "math/step.h"
#include "math/weights.h"
