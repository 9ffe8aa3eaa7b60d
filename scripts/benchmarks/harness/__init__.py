"""What the benchmarks share: timing in turns, the engines, targets, results and tables."""
