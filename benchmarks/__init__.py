"""The benchmark suite, installed as `minivae.benchmarks` and run by `minivae bench`."""
