"""The layout certificate: one rank against every other layout."""
