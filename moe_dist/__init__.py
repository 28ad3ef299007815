"""moe_dist: an expert-parallel trainer for sparse mixture-of-experts models."""
