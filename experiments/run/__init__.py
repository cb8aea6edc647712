"""Runs: from a recipe through stages to an exported model. Does not import `report`, `commands` or `lab`."""
