"""Ranks: the mesh, collectives, and what can go wrong between processes."""
