"""Studies: several variants (arms) of a recipe and several seeds, with tables and plots of the results."""
