"""Ranks: how they are arranged (`mesh`) and what they say to each other (`collectives`)."""
