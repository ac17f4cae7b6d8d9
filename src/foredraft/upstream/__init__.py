"""What we need of transformers and torch beyond their public, documented interfaces: a function for each need.

Their next release changes such names without notice, and this is the place to mend then. No other module may use them
(ruff's banned-api and private-member rules, and tests/test_upstream.py). Knows nothing of our models or weights.
"""
