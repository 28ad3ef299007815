"""What a run is: its config, the named configs of the papers, and its run folder. Imports no torch."""
