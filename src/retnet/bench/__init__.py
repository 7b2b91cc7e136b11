"""Benchmarks: the speed of this library as ratios to named peers and physical limits, side by side in one process."""
