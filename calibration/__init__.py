"""Learn what a bundle's plan leaves open: thresholds that fit the instance, and what to reserve."""
