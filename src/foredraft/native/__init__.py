"""The native pass: a C library that computes a whole forward pass, and its binding. Knows nothing of torch."""
