"""Networks as torch modules, and their parameters as one flat vector."""
