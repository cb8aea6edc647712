"""Exports of a model: files, gate, model card, quantized copies."""
