"""Building blocks of models: keyed random numbers, token contexts and initial weights."""
