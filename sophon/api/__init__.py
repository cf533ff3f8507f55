"""What there is to call from Python."""
