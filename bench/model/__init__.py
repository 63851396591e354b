"""A whole model in training: what NSA changes in the time of a step, everything else the same."""
