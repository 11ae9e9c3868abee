"""How good samples are: distances between sets of features, agreement with the asked class, and their intervals."""
