"""The op set as Triton kernels, for NVIDIA GPUs of compute capability 8.0 and later.

One file an algorithm: kernel, launch shape, candidates for tuning, launch wrapper. Importing them needs Triton.
"""
