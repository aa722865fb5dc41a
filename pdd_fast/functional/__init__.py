"""Differentiable building blocks for other methods: unroll, gradient matching, trajectory loss."""
