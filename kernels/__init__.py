"""The engine's CUDA kernels: CUDA C++ sources and their Numba CUDA twins."""
