"""Predictions for a distillation step on a cluster (memory, FLOPs, communication, time), and search for sizes."""
