"""The Triton twins of the CUDA and CPU kernels. All modules but this file import triton.

- math.py: the formulas, the twin of csrc/math.h.
- losses.py, weights.py, step.py, weighted.py: the operators, each the twin of a file of csrc/cuda.
- loss_rows.py, weigh.py: the work of a kernel on a tile of logits, and on a vector of losses.
- walk.py: how the programs of a launch share logits.
- tables.py, layouts.py: the tensors that a step walks over.
- launch.py: helpers of every launch.
"""
