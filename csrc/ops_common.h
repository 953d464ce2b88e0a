// What the operators of every device share, on LibTorch's stable ABI: how tensors become the structs of launch.h. The
// operators of each device are a library of their own.
#pragma once

#include "ops/losses.h"
#include "ops/signatures.h"
#include "ops/step.h"
#include "ops/weighted.h"
#include "ops/weights.h"
