"""Kernels in Triton, and in C++ for CPUs. Each has a plain PyTorch version with the same meaning,
named in its docstring.

They import triton or compile C++, so the functions that use them import them."""

# Head dims that the attention kernel is compiled for. Here, because modules with kernels need
# Triton, and the choice of a backend must not.
TRITON_HEAD_DIMS = (16, 32, 64, 128)
