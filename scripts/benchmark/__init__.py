"""The parts of scripts/bench.py: rlx beside TRL, each in processes of its own."""
