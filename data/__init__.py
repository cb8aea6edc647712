"""Data: readers of user files, the MAAD-synth generator, encoding, batches and metrics."""
