"""The layout certificate: compares every other layout with one rank."""
