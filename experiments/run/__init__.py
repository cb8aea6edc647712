"""The run machine: a recipe in, stages, an exported model; it imports nothing of the storeys above it."""
