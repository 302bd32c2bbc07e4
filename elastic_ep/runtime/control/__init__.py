"""The control channel between controller and ranks."""
