"""Triton twins of the CUDA and CPU kernels. The formulas are in math.py (the twin of csrc/math.h); the operators in losses.py,
weights.py, step.py and weighted.py, each the twin of a file of csrc/cuda. loss_rows.py and weigh.py are what kernels do with a tile of
logits and with a vector of losses; walk.py says how programs share logits, tables.py and layouts.py what a step walks over, launch.py
has what every launch needs. Those import triton; this file does not."""
