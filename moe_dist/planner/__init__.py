"""Estimates what every layout of a config costs on a cluster."""
