"""Commands of `antgmm` by subject. Commands import heavy libraries inside functions, so that `--help` is fast."""
