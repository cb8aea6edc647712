"""How long a run takes: forecast, pace, and what it reports about its steps."""
