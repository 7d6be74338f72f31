"""Fused kernels beside their references; models call `dispatch` and do not know what runs (design
§4)."""
