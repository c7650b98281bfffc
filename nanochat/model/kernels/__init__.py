"""Triton kernels. Each has a plain version with the same meaning beside where it is used; they are imported where they are used."""
