"""What pruning costs in answers: questions asked under several plans, and how well each did."""
