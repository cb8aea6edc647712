"""Compression without a recipe: measures model and data, and writes a recipe."""
