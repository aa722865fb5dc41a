"""Runtime: errors, files, devices, precision, seeds, progress and memory; no mathematics."""
