"""Kernels in Triton, and in C++ for CPUs. Each has a plain PyTorch version with the same meaning,
named in its docstring.

They import triton or compile C++, so the functions that use them import them."""

# Head dims that the attention kernel is compiled for. Here, because modules with kernels need
# Triton, and the choice of a backend must not.
TRITON_HEAD_DIMS = (16, 32, 64, 128)
# Channels that the kernel of the MLP takes are a multiple of this: copies by descriptors need rows
# of 16-bit numbers that begin at multiples of 16 bytes.
ROW_MULTIPLE = 8
