"""The machine that a run works on: its console, devices, memory, energy and facts."""
