"""Node health, decisions, tickets, metrics and reports."""
