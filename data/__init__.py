"""Data: the MAAD-synth generator, readers for a user's own files, processors, batches and metrics."""
