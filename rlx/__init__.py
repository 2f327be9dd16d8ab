"""rlx: post-training experiments as recipes."""

__version__ = "0.1.0"
