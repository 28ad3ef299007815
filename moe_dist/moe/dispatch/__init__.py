"""Dispatchers move rows to their experts' ranks and back; gates make the routing decisions."""
