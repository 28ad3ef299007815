"""The mixture-of-experts layer: gates decide, dispatchers move rows, experts compute."""
