// What every CUDA operator begins and ends with: its device and stream, and the error of a launch that failed.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "../../ops_common.h"
#include "../../torch_stream.h"

namespace {

void check(const char* failed) { STD_TORCH_CHECK(failed == nullptr, "absgd_fast: CUDA error: ", failed); }

// Makes the device of a tensor the current one, and finds its stream.
struct OnDevice {
  Device device;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  void* stream = nullptr;

  explicit OnDevice(const Tensor& t) : device(device_of(t)) {
    if (device.type == kCpu) return;
    guard.emplace(device.index);
    const char* const failed = torch_stream(device.index, &stream);
    STD_TORCH_CHECK(failed == nullptr, "absgd_fast: ", failed);
  }
};

}  // namespace
