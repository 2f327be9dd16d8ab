"""Where episodes come from: files, the hub and synthetic tasks, as messages (tokens are made by the policy)."""
