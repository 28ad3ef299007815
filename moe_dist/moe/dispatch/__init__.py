"""Dispatchers carry rows to their experts and back, and decide nothing."""
