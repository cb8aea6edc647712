"""What every family is assembled from."""
