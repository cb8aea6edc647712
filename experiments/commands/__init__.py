"""Commands of `antgmm`, by subject. Heavy libraries are imported inside a command, so that `--help` is quick."""
