"""Offer fused kernels beside their references; models never choose an engine."""
