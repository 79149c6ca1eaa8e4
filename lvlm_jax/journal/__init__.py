"""The one log that survives a kill, and the record of everything that decides what a run writes."""
