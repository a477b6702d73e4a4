"""Kernels in C, compiled on first use where a compiler exists; torch is the fallback."""
