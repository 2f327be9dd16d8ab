"""Environments: what answers the policy's messages."""
