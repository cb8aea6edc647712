"""Benchmarks, comparisons with other libraries, studies, and plans for clusters; runs do not need them."""
