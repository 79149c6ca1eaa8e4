"""Plans what a job needs on a mesh of devices, from compiled programs for which nothing is allocated."""
