"""The rows of a recipe: loading, encoding and batches."""
