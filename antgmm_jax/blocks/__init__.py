"""Building blocks shared by all model families."""
