"""How we measure: benchmarks, comparisons, studies and plans; nothing that a user's run needs."""
