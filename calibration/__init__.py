"""Learn thresholds, choose budgets, collect statistics. Nothing here yet but its place."""
