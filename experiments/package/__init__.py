"""An exported model as one compiled file that PyTorch runs without `transformers` and without this package."""
