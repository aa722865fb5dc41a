"""Command line without mathematics, installed as pdd_fast.cli."""
