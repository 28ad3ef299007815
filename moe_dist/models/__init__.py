"""Plain models; they contain no code about ranks."""
