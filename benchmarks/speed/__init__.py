"""What `token_reduction.py` measures: the cases, the variants in every back end, and the tables of its results."""
