"""The command line: `lvlm COMMAND`, one file for each command, and what they share."""
