"""Estimates every layout's cost on a cluster, for a given config."""
