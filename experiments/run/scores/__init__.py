"""Scores of a model: answers, losses, and answers of a server."""
