"""Fast expert kernels by device; each computes the same as plain torch in `moe/experts.py`."""
