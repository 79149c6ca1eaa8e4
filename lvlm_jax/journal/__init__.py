"""The log that survives a kill, and the record of everything that determines what a run writes."""
