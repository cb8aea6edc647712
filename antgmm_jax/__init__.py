"""The model that is compressed, and its way in and out."""
