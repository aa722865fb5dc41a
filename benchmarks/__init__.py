"""What ``pdd-fast bench`` measures, and what it measures against. Installed as
pdd_fast.benchmarks."""
