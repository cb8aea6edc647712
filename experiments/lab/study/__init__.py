"""Studies: arms of one recipe by seeds, run one after another, told as tables and plots with their spread."""
