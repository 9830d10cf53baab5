"""What the model costs, measured: see benchmarks/README.md."""
