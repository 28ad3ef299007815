"""Gates decide which experts a token visits, and move nothing. A file per paper."""
