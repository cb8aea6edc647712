"""An exported model as one compiled file that PyTorch or JAX runs without `transformers` and without this package."""
