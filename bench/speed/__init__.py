"""How fast: whole NSA beside dense attention and beside others' NSA, stage by stage, over lengths."""
