"""The protection: simulated attackers, suppression, reinforcement, and the loop that alternates them."""
