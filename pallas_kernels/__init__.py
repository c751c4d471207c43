"""GPU kernels of jattn, and the block ranges that all of its blocked attention shares."""
