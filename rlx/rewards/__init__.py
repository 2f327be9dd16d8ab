"""Rewards: the episodes of one group -> one number each; nan where an episode could not be scored.

`rules` holds the rewards that need no model, `answers` finds and compares final answers, `latex` compares formulas. `score`
asks all rewards of a recipe, `pool` computes the costly ones in worker processes.
"""
