"""Fused ops of the trainer: a torch path for CPU, Triton kernels for GPU. Imported as `gmai_kernels`."""
