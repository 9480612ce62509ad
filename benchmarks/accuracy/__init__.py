"""The accuracy benchmark: one training loop for every arm, experiments as recipes, results as JSON."""
