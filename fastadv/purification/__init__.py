"""The purification laboratory: sparse coding, a two-layer network, and what adversarial pre-training does to it.

Source: arXiv:2401.15248 for the model and the claims. Sizes, losses in detail and pass marks are ours.
"""
