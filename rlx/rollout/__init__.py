"""Policy x environment x tasks -> episodes."""
