"""Local data files: which files a path names, their formats, and their rows."""
