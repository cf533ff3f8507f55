"""The audit: attackers of plain torch.optim against a released model, and what came of it."""
