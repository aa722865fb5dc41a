"""Union evaluation, comparisons, ablations and plots."""
