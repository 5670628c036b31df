"""Real data, each set with its licence and its origin."""
