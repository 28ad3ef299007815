"""Plots and an HTML page of runs."""
