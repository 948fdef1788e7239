"""Commands that measure a running cluster or one of its parts. Results are kept as dated notes in docs/benchmarks."""
