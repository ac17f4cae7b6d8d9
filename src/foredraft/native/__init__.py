"""The native pass: a C library that computes a whole forward pass, its binding, and weights in its layout."""
