"""XLA flags of the tests.

Tests compile many programs and run each a few times, so compile time dominates. XLA's plan (fusion, memory,
collectives) stays the same.
"""

ORDERED = "--xla_backend_optimization_level=0"
"""Unoptimised machine code, for several processes: with XLA's older emitters their collectives once ran in different
orders, and gloo failed."""
QUICK = f"{ORDERED} --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
"""The same by XLA's older emitters, each program as one module: gradients of two tiny models take 3.5 s of CPU time
instead of 13.2."""
