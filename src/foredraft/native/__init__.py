"""The native pass: a C library that computes a whole forward pass, how it is built, and its binding."""
