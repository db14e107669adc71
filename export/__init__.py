"""From a checkpoint and a plan to a bundle."""
