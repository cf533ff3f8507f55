"""The meta-gradient of a simulated attacker, by two engines: first order, and second order through `higher`."""
