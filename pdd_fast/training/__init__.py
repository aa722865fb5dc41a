"""Plain training: SGD, its queue of precomputed steps, CUDA graphs, memory estimates."""
