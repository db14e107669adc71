"""What pruning costs the demo model in answers: the papers' tables at small scale."""
