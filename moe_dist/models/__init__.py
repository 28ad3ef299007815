"""Plain models that contain no code about ranks."""
