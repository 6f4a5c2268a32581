"""What a model can do, and how scores relate: predictions, metrics, gains, intervals."""
