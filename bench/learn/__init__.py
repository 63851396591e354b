"""Small models whose attention is swapped by name, trained side by side on tasks that need no download."""
