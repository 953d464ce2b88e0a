"""Triton twins of the CUDA and CPU kernels. The formulas are in math.py (the twin of csrc/math.h), the walks over rows in
losses.py, weights.py and step.py, what every launch needs in launch.py. Those import triton; this file does not."""
