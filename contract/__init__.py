"""What export and runtime agree on: plans, the manifest, files, errors. Standard library only."""
