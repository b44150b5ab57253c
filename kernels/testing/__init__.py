"""Proof of Triton kernels without a GPU: numerics, memory safety, traffic, machine code.

Four tools, each run through the real Python launchers:

- `interpreter` runs the kernels on CPU tensors, with exact bfloat16;
- `guard` runs them so that every address, every unwritten element and every race is checked;
- `traffic` counts the bytes that they load and store;
- `gate` compiles them for GPUs that are not there and reads registers, spills and access widths.
"""
