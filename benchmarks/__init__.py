"""Measure the package against the usual ways to write the same in PyTorch.

``pdd-fast bench`` runs these modules. They are installed as ``pdd_fast.benchmarks``.
"""
