"""Fast paths of the experts, by device; each equals the plain one in `moe/experts.py`."""
