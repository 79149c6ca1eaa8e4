"""The command line: `lvlm COMMAND`, one file per command, and shared code."""
