"""Corpora, mixing at an SNR, and splits."""
