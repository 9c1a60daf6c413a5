"""Subsets, kNN back ends and official metrics."""
