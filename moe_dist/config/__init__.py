"""The config of a run, the named configs of the papers, and the run folder. Imports no torch."""
