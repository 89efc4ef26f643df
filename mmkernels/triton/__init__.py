"""What Triton kernels share: how they are launched, and ``@triton.jit`` helpers. ``import mmkernels`` imports none."""
