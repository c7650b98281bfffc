"""Triton kernels. Each has a plain PyTorch version with the same meaning, named in its docstring.

They import triton, so the functions that use them import them."""
