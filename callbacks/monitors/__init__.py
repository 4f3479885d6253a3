"""Callbacks that measure the kernel: ``LambdaMin`` and ``KernelStability``."""
