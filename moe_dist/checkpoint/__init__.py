"""State of a run on disk: written by all ranks on any layout, read on any other."""
