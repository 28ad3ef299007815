"""Local data files: which files a path names, their formats, and the rows of each."""
