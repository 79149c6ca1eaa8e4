"""The log that survives a kill, and the record of everything that determines a run's output."""
