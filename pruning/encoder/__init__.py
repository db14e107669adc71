"""Methods that prune or merge inside the vision tower."""
