"""What both sides must agree on: plan, exchange, model, metrics, privacy arithmetic."""
