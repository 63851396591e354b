"""Benchmarks and experiments around flexnsa: `python -m bench --help`. Not part of the wheel."""
