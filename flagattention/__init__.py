"""Attention operators that run anywhere: Triton kernels on a GPU, torch elsewhere.

Empty yet: piecewise attention (two query/key pairs chosen by distance) will live here. The package
never imports flagscale, so that it can be used alone.
"""
