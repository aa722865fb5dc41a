"""The command line: wiring only. Installed as pdd_fast.cli."""
