"""The coordinator: rounds, strategy, checkpoint, report, deployment."""
