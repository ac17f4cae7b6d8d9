"""What is installed, what this machine is, what serves a model here, and which promises hold.

machine    processor, cores and memory, without torch
serving    torch's kernels and devices; runtime, layers and memory of one LLM
promises   what the probe found, and a short text decoded in every way that must agree
setting    the model, the machine and the versions, for reports of other commands
diagnose   all of it for one model, failures included
report     the same for people
"""
