"""One hospital: data, training, ledger, agent."""
