"""What a job needs on a mesh of devices, from compiled programs for which nothing was allocated."""
