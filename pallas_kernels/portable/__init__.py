"""Attention for every NVIDIA GPU from Ampere on: flash and query-chunked, forward and backward."""
