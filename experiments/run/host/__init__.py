"""The machine of a run: console, devices, memory, energy and hardware facts."""
