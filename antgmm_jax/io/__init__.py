"""The model's way in and out of files."""
