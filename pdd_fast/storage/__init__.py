"""Files of a run: run directory, distilled sets, trajectories, and formats of other code."""
