"""Independent references in plain NumPy float64, from the formulas, sharing no code with the library."""
