"""One define-by-run search space per system, with its published recipes."""
